"""What vLLM does beside attention, with pages on a GPU: adapters, windows, FP8 weights, grammars.

Run by name on a machine with vLLM, xgrammar and a CUDA device:
`pytest tests/integrations/vllm_feature_gpu_cases.py`. All engines run at once, over two layers of
the 8B shape.
"""

from __future__ import annotations

import re

import pytest

from support.vllm_engines import CLOSE, LENGTHS, agree, of, run_engines

pytestmark = pytest.mark.gpu

SMALL = {"num_hidden_layers": 2, "vocab_size": 8192}
ADAPTERS = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 2}
WINDOW = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 3500}
ENGINES = {
    f"{way} {kind}": {"gigabytes": 1.5, "config": SMALL | config} | cache | options
    for kind, options, config in (
        ("adapters", ADAPTERS, {}),
        ("window", {}, WINDOW),
        ("fp8", {"quantization": "fp8"}, {}),
    )
    for way, cache in (
        ("flash", {"own": True}),
        ("exact", {"kv_format": "exact"}),
        # a calibration is made of weights as they are, so not of FP8
        ("pages", {"kv_format": "spectral-page" if kind == "fp8" else "spectral-quality"}),
    )
}
PATTERN = r"[0-9]{3}-[a-f]{4}(yes|no)"

BODY = r"""
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

SHAPES = {"self_attn.q_proj": (4096, 4096), "self_attn.v_proj": (1024, 4096),
          "mlp.down_proj": (4096, 14336)}

def adapter(number):
    where = folder / f"adapter-{number}"
    where.mkdir()
    generator = torch.Generator().manual_seed(number)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (outputs, inputs) in SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(8, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs, 8, generator=generator) * 0.3
            weights |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file({k: v.bfloat16() for k, v in weights.items()}, where / "adapter_model.safetensors")
    (where / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none",
        "base_model_name_or_path": str(folder), "lora_dropout": 0.0,
        "target_modules": [name.rpartition(".")[2] for name in SHAPES]}))
    return LoRARequest(f"adapter-{number}", number, str(where))

result |= {"cold": run(prompts), "first": stats()}
if options.get("enable_lora"):
    one, two = adapter(1), adapter(2)
    result["one"] = run(prompts, lora_request=one)
    result["one again"] = run(prompts, lora_request=one)
    result["two"] = run(prompts, lora_request=two)
    llm.reset_prefix_cache()
    named = [None] * len(prompts) + [one] * len(prompts) + [two] * len(prompts)
    result["mixed"] = run(prompts * 3, lora_request=named)
result["hit"] = run(prompts)
result["end"] = stats()
held = SamplingParams(temperature=1.0, seed=1, max_tokens=60,
                      structured_outputs=StructuredOutputsParams(regex=PATTERN))
free = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
found = llm.generate(prompts + prompts, [held] * len(prompts) + [free] * len(prompts),
                     use_tqdm=False)
result["held"] = [output.outputs[0].text for output in found[: len(prompts)]]
result["free"] = [
    {"tokens": list(output.outputs[0].token_ids),
     "logprobs": [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs]}
    for output in found[len(prompts):]]
result["end"] = stats()
""".replace("PATTERN", repr(PATTERN)).replace("NUM_TOKENS", "96")
PAGED = [name for name in ENGINES if "flash" not in name]


def close_of(name):
    """FP8 rounds inputs too: FLASH_ATTN in another batch is up to 0.13 from itself."""
    return 2 * CLOSE if "fp8" in name else CLOSE


@pytest.fixture(scope="module")
def found():
    return run_engines(ENGINES, BODY, "vllm-features")


@pytest.mark.parametrize("kind", ["adapters", "window", "fp8"])
def test_exact_pages_give_the_tokens_of_flash_attention(found, kind):
    agree(of(found, f"flash {kind}")["cold"], of(found, f"exact {kind}")["cold"], close_of(kind))


@pytest.mark.parametrize("name", [name for name in PAGED if "pages" in name])
def test_blocks_are_sealed_and_read(found, name):
    stats = of(found, name)["first"]
    assert stats["pages_sealed"] > 0 and stats["pages_attended"] > 0 and stats["graph_replays"] > 0


@pytest.mark.parametrize("adapter", ["one", "two"])
def test_an_adapter_says_in_pages_what_it_says_in_flash_attention(found, adapter):
    flash, exact = of(found, "flash adapters"), of(found, "exact adapters")
    agree(flash[adapter], exact[adapter])
    assert all(
        a["tokens"] != b["tokens"] for a, b in zip(exact[adapter], exact["cold"], strict=True)
    )


@pytest.mark.parametrize("name", ["exact adapters", "pages adapters"])
def test_no_prefix_is_hit_by_another_adapter(found, name):
    result = of(found, name)
    assert [one["cached"] for one in result["one"] + result["two"]] == [0] * 2 * len(LENGTHS)
    for one, length in list(zip(result["one again"], LENGTHS, strict=True))[1:]:
        assert one["cached"] >= length - 64
    agree(result["one"], result["one again"])


@pytest.mark.parametrize("name", ["exact adapters", "pages adapters"])
def test_adapters_of_one_batch_say_what_each_says_alone(found, name):
    result = of(found, name)
    agree(result["cold"] + result["one"] + result["two"], result["mixed"])


@pytest.mark.parametrize("name", PAGED)
def test_a_prefix_hit_gives_the_tokens_of_a_cold_run(found, name):
    result = of(found, name)
    assert all(one["cached"] > 0 for one in result["hit"][1:])
    agree(result["cold"], result["hit"], close_of(name))


@pytest.mark.parametrize("name", PAGED)
def test_grammars_hold_and_leave_other_requests_as_they_were(found, name):
    result = of(found, name)
    assert len(result["held"]) == len(LENGTHS)
    assert all(re.fullmatch(PATTERN, text) for text in result["held"]), result["held"]
    agree(result["cold"], result["free"], close_of(name))


@pytest.mark.parametrize("name", PAGED)
def test_nothing_is_held_at_the_end(found, name):
    end = of(found, name)["end"]
    assert end["num_sequences"] == 0 and end["kv_cache_usage"] == 0
