"""A small model in place of every model, so that examples of the documentation run in seconds.

It has the heads of the embedded model (9 query heads over 3 KV heads of width 64), so that formats
and shapes that a page shows fit both.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from functools import cache

import torch
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from spectral_paged.conformance.small_llama import small_llama
from spectral_paged.models import calibration, loader, ready_model
from spectral_paged.models.geometry import ModelGeometry
from support.paths import ROOT

HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "hidden_size": 72}
VOCAB = 1024
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@cache
def tokenizer():
    """A byte-level BPE tokenizer of some three characters a token, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([calibration.builtin_text()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="!", eos_token="!")
    fast.chat_template = TEMPLATE
    return fast


def model(**changes):
    return small_llama(**(HEADS | {"vocab_size": VOCAB, "max_position_embeddings": 8192} | changes))


def load_model(name, *, device, dtype, trust_remote_code=False, check=None):
    """A stand-in for `loader.load_model` that returns the small model for every name."""
    made = model()
    if check is not None:
        check(ModelGeometry.from_config(made.config), made.config)
    return loader.LoadedModel(
        name, made.to(device, dtype), tokenizer(), ModelGeometry.from_config(made.config)
    )


def pretrained_model(*args, attn_implementation=None, **kwargs):
    """A stand-in for `AutoModelForCausalLM.from_pretrained`, with the small model."""
    made = model()
    if attn_implementation is not None:
        made.set_attn_implementation(attn_implementation)
    return made


def pretrained_tokenizer(*args, padding_side="right", **kwargs):
    made = copy.deepcopy(tokenizer())
    made.padding_side = padding_side
    return made


def enter(monkeypatch, folder):
    """Make every way to load a model return the small one, and `folder` the working folder."""
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(folder.parent / "cache"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ready_model, "load_model", load_model)
    monkeypatch.setattr(loader, "load_model", load_model)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pretrained_model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", pretrained_tokenizer)


def example(monkeypatch, name):
    """The module of an example; it is executed, so it comes after `enter`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def names():
    """Names that a page may use without defining them, because its reader would have them."""
    prompts = ["The sea is", "Two and two make"]
    return {
        "__name__": "documentation",
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model": model(),
        "tokenizer": tokenizer(),
        "prompts": prompts,
        "inputs": pretrained_tokenizer(padding_side="left")(
            prompts, return_tensors="pt", padding=True
        ),
        "registry": CollectorRegistry(),
        "make_adapter": lambda config: None,
        "q": torch.randn(18, 9, 64),
        "k": torch.randn(18, 3, 64),
        "v": torch.randn(18, 3, 64),
    }
