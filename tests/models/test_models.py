"""Models of every served family against transformers' own `generate`; others are refused."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as tf

from spectral_paged import LLM, SamplingParams
from spectral_paged.errors import UnsupportedModelError
from spectral_paged.models.geometry import ModelGeometry, rotary_table
from support.families import reference
from support.model_variants import LONGEST, VARIANTS, build
from support.real_text import smollm2, text
from support.tiny_model import random_prompts

MAX_TOKENS = 16
BUDGETS = [64, 512, 8192]
# around 64 and 512, around a landmark page and one block, and lengths that are nothing special
LENGTHS = [1, 2, 5, 63, 64, 65, 127, 128, 129, 300, 511, 512, 513, 575, 576, 577, 639, 641, 705]


def greedy(model, prompts, max_tokens=MAX_TOKENS, **options):
    """Greedy tokens of all prompts in one batch, and the run's figures."""
    llm = LLM.from_model(model, **({"kv_cache_bytes": 16 << 20} | options))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    llm.cache.check_integrity()
    return [o.outputs[0].token_ids for o in outputs], llm.stats()


@functools.cache
def exact_case(variant):
    """Prompts of `LENGTHS` tokens, and what transformers' generate says to them."""
    prompts = random_prompts(LENGTHS, seed=1)
    return prompts, reference(build(variant), prompts, MAX_TOKENS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_random_model_says_different_things(variant):
    prompts, want = exact_case(variant)
    assert len({tuple(w) for w in want}) == len(prompts)
    assert sum(len(set(w)) for w in want) > 4 * len(prompts)
    longer = [(p, w) for p, w in zip(prompts, want) if len(p) > 127]
    ends = reference(build(variant), [p[-64:] for p, _ in longer], MAX_TOKENS)
    assert sum(e != w for e, (_, w) in zip(ends, longer)) == len(longer), "far tokens count"


@pytest.mark.parametrize(
    "variant, budget",
    # how a prompt is cut into chunks depends on no model; the first is run by every budget
    [(v, b) for i, v in enumerate(VARIANTS) for b in (BUDGETS[:1] if i else BUDGETS)],
)
def test_exact_greedy_is_transformers_generate_token_for_token(variant, budget):
    prompts, want = exact_case(variant)
    got, stats = greedy(build(variant), prompts, kv_format="exact", max_num_batched_tokens=budget)
    assert got == want
    assert stats["pages_sealed"] == 0 and stats["preemptions"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rotary_table_is_the_models_own(variant):
    model = build(variant)
    table = rotary_table(model, LONGEST, torch.device("cpu"))
    ids = torch.arange(LONGEST)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), ids)
    half = table.cos.shape[1]
    assert torch.equal(cos[0, :, :half], table.cos) and torch.equal(sin[0, :, :half], table.sin)
    assert torch.equal(cos[0, :, half:], table.cos), "the halves pair i with i + D/2"
    if "yarn" in variant:
        assert float((table.cos**2 + table.sin**2).mean()) > 1.1, "yarn scales cos and sin"


@pytest.mark.parametrize("format", ["spectral-int8", "spectral-int8-post"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_spectral_pages_are_attended_and_a_batch_changes_no_token(variant, format):
    prompts = random_prompts([705, 1217, 3, 800, 1087, 64], seed=2)
    options = {"kv_format": format, "prefill_segment": 512}
    got, stats = greedy(build(variant), prompts, **options)
    assert stats["pages_sealed"] > 0 and stats["pages_attended"] > 0
    for prompt, want in zip(prompts, got):
        assert len(want) == MAX_TOKENS
        alone, stats = greedy(build(variant), [prompt], **options)
        assert alone == [want]
        assert (stats["pages_attended"] > 0) == (len(prompt) > 640)
    assert len({tuple(w) for w in got}) == len(prompts)


# ---- SmolLM2 -----------------------------------------------------------------------------

REAL_LENGTHS = [1, 2, 9, 31, 63, 64, 65, 129, 701]  # LENGTHS has more, for small models


@pytest.fixture(scope="module")
def real_case():
    """The embedded model, pieces of real text, and what transformers' generate says to them."""
    loaded = smollm2()
    before = loaded.model.config._attn_implementation
    names = ["alice", "moby_dick", "sherlock_holmes", "time_machine"]
    bodies = [loaded.tokenizer(text(name)[2000:8000])["input_ids"] for name in names]
    prompts = [bodies[i % 4][: REAL_LENGTHS[i]] for i in range(len(REAL_LENGTHS))]
    assert [len(p) for p in prompts] == REAL_LENGTHS
    yield loaded, prompts, reference(loaded.model, prompts, 6)
    loaded.model.set_attn_implementation(before)


@pytest.mark.model
@pytest.mark.parametrize("budget", (BUDGETS[0], BUDGETS[-1]))
def test_smollm2_exact_greedy_is_transformers_generate(real_case, budget):
    loaded, prompts, want = real_case
    options = {"kv_cache_bytes": 64 << 20, "max_num_batched_tokens": budget}
    got, _ = greedy(loaded.model, prompts, 6, kv_format="exact", **options)
    eos = loaded.model.generation_config.eos_token_id
    assert [g if eos not in g else g[: g.index(eos) + 1] for g in got] == want
    assert len({tuple(w) for w in want}) > len(want) // 2


# ---- refusals ----------------------------------------------------------------------------

REFUSED = {
    "gemma3 with images": (tf.Gemma3Config, {}, "'gemma3' .*text model, of type gemma3_text"),
    "K and V that layers share": (tf.Gemma4TextConfig, {}, "'gemma4_text' .* take a model of"),
    "gemma3 that looks ahead": (
        tf.Gemma3TextConfig,
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention .*take a causal model",
    ),
    "phi": (tf.PhiConfig, {}, "'phi' .* take a model of"),
    "gpt2": (tf.GPT2Config, {}, "'gpt2' .* take a model of"),
    "encoder-decoder": (tf.T5Config, {}, "'t5' .* take a model of"),
    "mixture of experts": (tf.DeepseekV3Config, {}, "'deepseek_v3' .* take a model of"),
    "soft cap": (
        tf.LlamaConfig,
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping 50.0.*remove it from the config",
    ),
    "dynamic rope": (
        tf.LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "'dynamic'.*rope_parameters",
    ),
    "longrope": (
        tf.LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 1024,
                "short_factor": [1.0] * 64,
                "long_factor": [2.0] * 64,
            }
        },
        "'longrope'.*rope_parameters",
    ),
    "longrope in phi3": (
        tf.Phi3Config,
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            },
        },
        "'longrope'.*rope_parameters",
    ),
    "dynamic rope of one kind of layers": (
        tf.Gemma3TextConfig,
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
            }
        },
        "'dynamic'.*rope_parameters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_name_with_a_remedy(case):
    config_class, changes, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        ModelGeometry.from_config(config_class(**changes))


def test_a_refused_model_keeps_its_own_attention():
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = tf.GPT2LMHeadModel(config)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        LLM.from_model(model)
    assert model.config._attn_implementation == before
