"""Pages inside vLLM on a GPU: tokens beside vLLM's own attention, graphs, preemption, prefix hits.

Run by name on a machine with vLLM and a CUDA device: `pytest tests/integrations/vllm_gpu_cases.py`.
Engines run in processes of their own, all at once, over one model: eight layers of the 8B shape
with random weights, large enough that attention decides the next token. bf16 sums depend on the
size of a batch, so tokens may part where two logits are nearly equal; a wrong kernel or a stale
page parts them at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spectral_paged.kernels.chunk import fa3
from spectral_paged.kernels.chunk.gpu import chunk_attention
from spectral_paged.kernels.chunk.reference import KEY_GAP, chunk_attention as twin
from support.chunk_kernels import chunk_case

pytestmark = pytest.mark.gpu

LENGTHS = (40, 700, 1500, 3000, 5000)
NUM_TOKENS = 96
CLOSE = 0.02  # of a log-prob
ENGINES = {
    "flash": {"own": True},
    "flash eager": {"own": True, "enforce_eager": True},
    "exact": {"kv_format": "exact"},
    "exact eager": {"kv_format": "exact", "enforce_eager": True},
    "pages": {"kv_format": "spectral-quality"},
    "pages eager": {"kv_format": "spectral-page", "enforce_eager": True},
    "pages little": {"kv_format": "spectral-quality", "gigabytes": 0.18},
}

CHILD = r"""
import json, os, pathlib, sys, tempfile
os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
import numpy as np
import torch
from vllm import LLM, SamplingParams
from spectral_paged.benchmarks.throughput.vllm_server import byte_tokenizer
from spectral_paged.integrations.vllm import engine_args

given = json.loads(sys.argv[1])
own, gigabytes = given.pop("own", False), given.pop("gigabytes", 8)
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False}))
byte_tokenizer(folder)  # a calibration reads text
options = {} if own else engine_args(max_num_seqs=16, **{"kv_format": given.pop("kv_format")})
options |= given
options.setdefault("max_num_seqs", 16)
llm = LLM(model=str(folder), load_format="dummy", dtype="bfloat16",
          max_model_len=8192, kv_cache_memory_bytes=int(gigabytes * 2**30), seed=0,
          gpu_memory_utilization=0.1, generation_config="vllm", disable_log_stats=False, **options)

def louder(model):
    generator = torch.Generator(device="cuda").manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                noise = torch.randn(weight.shape, generator=generator, device=weight.device)
                weight.copy_(noise * 0.02)

llm.apply_model(louder)
rng = np.random.default_rng(0)
prompts = [{"prompt_token_ids": rng.integers(256, 100000, n).tolist()} for n in LENGTHS]
def run(some, num_tokens=NUM_TOKENS):
    found = []
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True,
                            detokenize=False, logprobs=1)
    for output in llm.generate(some, params, use_tqdm=False):
        one = output.outputs[0]
        logprobs = [next(iter(entry.values())).logprob for entry in one.logprobs]
        found.append({"tokens": list(one.token_ids), "logprobs": logprobs,
                      "cached": output.num_cached_tokens, "reason": one.finish_reason})
    return found

def stats():
    return {} if own else llm.collective_rpc("page_stats")[0]

result = {"cold": run(prompts), "first": stats()}
result["hit"] = run(prompts)
llm.reset_prefix_cache()
result["alone"] = run(prompts[3:4])
crowd = [{"prompt_token_ids": rng.integers(256, 100000, 300 + 90 * i).tolist()} for i in range(11)]
result["crowd"] = run(prompts + crowd)
# admitted together, they outgrow a small cache
short = [{"prompt_token_ids": rng.integers(256, 100000, 40).tolist()} for i in range(16)]
result["grown"] = run(short, 600)
result["preemptions"] = sum(m.value for m in llm.get_metrics() if "num_preemptions" in m.name)
result["end"] = stats()
print("RESULT " + json.dumps(result, default=str))
"""


def run_engine(options):
    code = CHILD.replace("LENGTHS", repr(LENGTHS)).replace("NUM_TOKENS", repr(NUM_TOKENS))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[0][7:]) if lines else done.stderr[-4000:]


@pytest.fixture(scope="module")
def found():
    with ThreadPoolExecutor(len(ENGINES)) as pool:
        results = dict(zip(ENGINES, pool.map(run_engine, ENGINES.values())))
    if where := os.environ.get("OUT"):
        with open(f"{where}/vllm-cases.json", "w") as file:
            json.dump(results, file)
    return results


def of(found, name):
    assert isinstance(found[name], dict), found[name]
    return found[name]


def agree(one, other):
    """Equal first log-probs, and equal tokens for most of the way in most prompts."""
    lengths = []
    for a, b in zip(one, other, strict=True):
        assert abs(a["logprobs"][0] - b["logprobs"][0]) < CLOSE
        pairs = list(zip(a["tokens"], b["tokens"], strict=True))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        lengths.append(same)
        if same < len(pairs):  # a near tie: both had about the same log-prob
            assert abs(a["logprobs"][same] - b["logprobs"][same]) < 10 * CLOSE
    assert sorted(lengths)[len(lengths) // 2] >= 0.9 * NUM_TOKENS, lengths


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
    agree(result["alone"], result["crowd"][3:4])
    agree(result["cold"], result["crowd"][: len(LENGTHS)])


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
