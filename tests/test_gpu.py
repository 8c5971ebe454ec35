"""The same answers on a CUDA device; run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from tiny_model import random_prompts, tiny_format, tiny_llm, tiny_model

from spectral_paged import LLM, SamplingParams
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


def test_a_page_encoded_on_the_gpu_means_what_it_means_on_the_cpu():
    format = tiny_format().with_ranks(16, 16)
    k, v = torch.randn(2, 5, 2, 512, 16)
    here = decode_pages(encode_pages(k, v, format), format)
    there = decode_pages(encode_pages(k.cuda(), v.cuda(), format), format)
    for x, y in zip(here, there):
        assert float((x - y.cpu()).norm() / x.norm()) < 1e-3


@pytest.mark.parametrize("batch", [7, 64])
def test_gpu_pages_do_not_depend_on_the_encoders_batch(batch):
    format = tiny_format()
    k, v = torch.randn(2, 64, 2, 512, 16, device="cuda")
    alone = torch.cat([encode_pages(k[i : i + 1], v[i : i + 1], format) for i in range(64)])
    parts = zip(k.split(batch), v.split(batch))
    together = torch.cat([encode_pages(a, b, format) for a, b in parts])
    for x, y in zip(decode_pages(alone, format), decode_pages(together, format)):
        assert float((x - y).norm() / x.norm()) < 1e-4
