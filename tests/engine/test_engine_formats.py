"""Generation over pages of mixed bands: batching, prefixes and pressure change no token."""

from __future__ import annotations

import functools

import pytest

from spectral_paged import LLM, PageFormat, SamplingParams
from spectral_paged.models.calibration import model_fingerprint
from support.page_parts import toy_basis
from support.tiny_model import random_prompts, tiny_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=10)
LENGTHS = [1, 65, 577, 640, 700, 1088, 1217]
MIXED = PageFormat(
    "mixed",
    2,
    32,
    ((16, 8), (16, 3)),
    ((16, 4), (16, 2)),
    gain=True,
    outlier_slots=4,
    band_rotation=True,
    prefill_segment=512,
)
SHARED = PageFormat(
    "shared",
    2,
    32,
    ((16, 8), (16, 3)),
    ((16, 4), (16, 2)),
    basis="shared",
    gain=True,
    dim_weighting="calibrated",
    scale_tokens=64,
    prefill_segment=512,
)
FORMATS = {"mixed": MIXED, "shared": SHARED}


@functools.cache
def model():
    return tiny_model(head_dim=32)


def make(name, **options):
    format = FORMATS[name]
    if format.needs_calibration:
        options["calibration"] = toy_basis(2, 2, 32, model=model_fingerprint(model()))
    defaults = {"kv_cache_bytes": 24 << 20, "max_num_seqs": 16, "debug_poison": True}
    return LLM.from_model(model(), kv_format=format, **(defaults | options))


def generate(llm, prompts, params=PARAMS):
    out = llm.generate(prompts, params, use_tqdm=False)
    llm.cache.check_integrity()
    assert llm.stats()["num_sequences"] == 0
    return [o.outputs[0].token_ids for o in out]


@pytest.mark.parametrize("name", FORMATS)
def test_a_batch_says_what_each_says_alone(name):
    prompts = random_prompts(LENGTHS)
    alone = [generate(make(name), [p])[0] for p in prompts]
    assert len({tuple(a) for a in alone}) == len(prompts)
    for order, budget in ((1, 8192), (-1, 512), (1, 64)):
        llm = make(name, max_num_batched_tokens=budget)
        assert generate(llm, prompts[::order])[::order] == alone
        assert llm.stats()["pages_sealed"] > 0 and llm.stats()["pages_attended"] > 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_prefix_hit_changes_no_token(name):
    shared, *ends = random_prompts([1300, 5, 90, 400], seed=9)
    prompts = [shared + e for e in ends] + [shared]
    want = generate(make(name, enable_prefix_caching=False), prompts)
    warm = make(name)
    generate(warm, [shared])
    out = warm.generate(prompts, PARAMS, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in out] == want
    assert all(o.metrics.num_cached_tokens >= 1280 for o in out)


LONG = (
    random_prompts([400, 600, 620, 560, 610, 640], seed=5),
    SamplingParams(temperature=0.0, max_tokens=90),
)


@functools.cache
def in_a_roomy_pool(name):
    roomy = make(name, enable_prefix_caching=False)
    found = generate(roomy, *LONG)
    assert roomy.stats()["preemptions"] == 0
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_full_pool_preempts_and_changes_no_token(name, prefix_caching):
    tight = make(name, kv_cache_bytes=1_600_000, enable_prefix_caching=prefix_caching)
    assert generate(tight, *LONG) == in_a_roomy_pool(name)
    assert tight.stats()["preemptions"] > 0
