"""Pages inside vLLM on a GPU: tokens beside vLLM's own attention, graphs, preemption, prefix hits.

Run by name on a machine with vLLM and a CUDA device: `pytest tests/integrations/vllm_gpu_cases.py`.
All engines run at once, over eight layers of the 8B shape.
"""

from __future__ import annotations

import pytest
import torch

from spectral_paged.kernels.chunk import fa3
from spectral_paged.kernels.chunk.gpu import chunk_attention
from spectral_paged.kernels.chunk.reference import KEY_GAP, chunk_attention as twin
from support.chunk_kernels import chunk_case
from support.vllm_engines import CLOSE, LENGTHS, NUM_TOKENS, agree, of, run_engines

pytestmark = pytest.mark.gpu

ENGINES = {
    "flash": {"own": True},
    "flash eager": {"own": True, "enforce_eager": True},
    "exact": {"kv_format": "exact"},
    "exact eager": {"kv_format": "exact", "enforce_eager": True},
    "pages": {"kv_format": "spectral-quality"},
    "pages eager": {"kv_format": "spectral-page", "enforce_eager": True},
    "pages little": {"kv_format": "spectral-quality", "gigabytes": 0.18},
}

BODY = r"""
result |= {"cold": run(prompts), "first": stats()}
result["hit"] = run(prompts)
llm.reset_prefix_cache()
result["alone"] = run(prompts[3:4])
crowd = [made_up(300 + 90 * i) for i in range(11)]
result["crowd"] = run(prompts + crowd)
# admitted together, they outgrow a small cache
short = [made_up(40) for i in range(16)]
result["grown"] = run(short, 600)
result["preemptions"] = sum(m.value for m in llm.get_metrics() if "num_preemptions" in m.name)
result["end"] = stats()
"""


@pytest.fixture(scope="module")
def found():
    return run_engines(ENGINES, BODY, "vllm-cases")


@pytest.mark.parametrize("how", ["", " eager"])
def test_exact_pages_give_the_tokens_of_flash_attention(found, how):
    agree(of(found, f"flash{how}")["cold"], of(found, f"exact{how}")["cold"])


@pytest.mark.parametrize("kind", ["exact", "pages"])
def test_decode_steps_are_graphs_unless_eager_is_asked_for(found, kind):
    assert of(found, kind)["first"]["graph_replays"] > 0.8 * NUM_TOKENS
    assert of(found, f"{kind} eager")["first"]["graph_replays"] == 0


@pytest.mark.parametrize("kind", ["flash", "exact"])
def test_a_compiled_model_parts_from_an_eager_one_only_at_near_ties(found, kind):
    """Compiled layers round elsewhere, with vLLM's own attention as with pages."""
    for a, b in zip(of(found, kind)["cold"], of(found, f"{kind} eager")["cold"]):
        assert abs(a["logprobs"][0] - b["logprobs"][0]) < CLOSE


@pytest.mark.parametrize("name", ["pages", "pages eager"])
def test_blocks_are_sealed_and_read(found, name):
    stats = of(found, name)["first"]
    assert stats["pages_sealed"] > 0 and stats["pages_attended"] > 0


def test_the_default_format_is_sealed_and_read_by_the_fast_kernels(found):
    stats = of(found, "pages")["first"]
    assert stats["backend"] == "gluon" and stats["seal_backend"] == "triton"


@pytest.fixture
def hopper():
    """vLLM's build of FlashAttention 3 in this process."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    from spectral_paged.integrations.vllm.flash_attention import BUILD

    fa3.use_build(BUILD)
    yield
    fa3.use_build(None)


def test_prompts_attend_through_vllms_flash_attention_3(hopper, found):
    for name in ("exact", "pages", "pages eager"):
        assert of(found, name)["first"]["prefill_backend"] == "fa3"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window, softcap", [(None, None), (50, None), (None, 3.0), (50, 3.0)])
@pytest.mark.parametrize("group, dim", [(1, 64), (4, 128), (7, 128), (3, 96), (2, 256)])
def test_vllms_build_attends_to_chunks_as_the_twin_does(hopper, group, dim, window, softcap, dtype):
    q, k, v, spans = chunk_case(group, dim, dtype, KEY_GAP)
    options = {"spans": spans, "scale": 0.1, "window": window, "softcap": softcap}
    want = twin(q, k, v, **options)
    got = chunk_attention(q, k, v, by="fa3", **options)
    assert float((got.float() - want).norm() / want.norm()) < 5e-3
    values = v.clone()
    for start in spans.gap_starts:
        values[:, start : start + spans.gap] = 0
    _, last = list(spans)[-1]
    values[:, last] = torch.nan
    spoiled = chunk_attention(q, k, values, by="fa3", **options)
    others = slice(spans.q_ends[-2])
    assert torch.equal(spoiled[others], got[others]) and spoiled[spans.q_ends[-2] :].isnan().all()


@pytest.mark.parametrize("name", ["exact", "pages"])
def test_a_prompt_gives_the_same_alone_and_in_a_crowd(found, name):
    result = of(found, name)
    crowd = result["crowd"]
    agree(result["alone"] + result["cold"], crowd[3:4] + crowd[: len(LENGTHS)])


@pytest.mark.parametrize("name", ["exact", "pages", "pages eager"])
def test_a_prefix_hit_gives_the_tokens_of_a_cold_run(found, name):
    result = of(found, name)
    assert all(one["cached"] >= length - 64 for one, length in zip(result["hit"][1:], LENGTHS[1:]))
    agree(result["cold"], result["hit"])


def test_preempted_requests_give_the_tokens_of_others(found):
    result = of(found, "pages little")
    assert result["preemptions"] > 0
    agree(of(found, "pages")["crowd"], result["crowd"])
    agree(of(found, "pages")["grown"], result["grown"])


@pytest.mark.parametrize("name", [name for name in ENGINES if "flash" not in name])
def test_nothing_is_held_at_the_end(found, name):
    end = of(found, name)["end"]
    assert end["num_sequences"] == 0 and end["kv_cache_usage"] == 0
