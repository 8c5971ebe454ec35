"""The same answers on a CUDA device; run with `pytest -m gpu`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_model import random_prompts, tiny_format, tiny_llm, tiny_model

from spectral_paged import LLM, PageFormat, SamplingParams
from spectral_paged.codec import decode_pages, encode_pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.mark.parametrize("format", ["spectral-int8", "spectral-int8-post", "exact"])
def test_a_batch_on_the_gpu_says_what_it_says_on_the_cpu(format):
    prompts = random_prompts([1, 64, 577, 640, 1217, 1500])
    here = tiny_llm(tiny_format(format)).generate(prompts, GREEDY, use_tqdm=False)
    llm = LLM.from_model(
        tiny_model().cuda(), kv_format=tiny_format(format), kv_cache_bytes=16 << 20, poison=True
    )
    there = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in there] == [o.outputs[0].token_ids for o in here]
    assert llm.stats()["pages_attended"] > 0 or format == "exact"
    llm.cache.check_integrity()


def test_a_page_encoded_on_the_gpu_is_as_good_as_one_of_the_cpu():
    format = tiny_format()
    x = torch.randn(2, 5, 2, 512, 6) @ torch.randn(2, 5, 2, 6, 16)
    for side, (k, v) in enumerate(((x[0], x[1]), (x[0].cuda(), x[1].cuda()))):
        for got, want in zip(decode_pages(encode_pages(k, v, format), format), (x[0], x[1])):
            assert float((got.cpu() - want).norm() / want.norm()) < 0.01, side


@pytest.mark.parametrize("heads, dim", [(2, 16), (8, 128), (3, 64)])
@pytest.mark.parametrize("decomposition", ["gram", "randomized"])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_gpu_bytes_do_not_depend_on_the_encoders_batch(heads, dim, decomposition, batch):
    base = PageFormat.preset("spectral-int8", num_kv_heads=heads, head_dim=dim)
    format = dataclasses.replace(base, decomposition=decomposition)
    count = 70 if batch > 1 else 5  # across a border of CUDA_BATCH, and one by one
    k, v = torch.randn(2, count, heads, 512, dim, device="cuda")
    order = torch.randperm(count, device="cuda")
    parts = zip(k[order].split(batch), v[order].split(batch))
    together = torch.cat([encode_pages(a, b, format) for a, b in parts])
    assert torch.equal(together, encode_pages(k, v, format)[order])
