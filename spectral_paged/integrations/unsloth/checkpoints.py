"""Small checkpoints that Unsloth loads without a hub, a real tokenizer or bitsandbytes."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_checkpoint(model: Any, folder: Path) -> None:
    """Save `model` with a tokenizer that has one made-up word for each id."""
    model.save_pretrained(folder)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    words |= {f"w{i}": i for i in range(3, model.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # a text is as many tokens as words
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Give bitsandbytes and peft an empty class of 4-bit layers inside the `with` block.

    Loading needs the class also for models without 4-bit layers.
    """
    import peft.tuners.lora as lora

    if "bitsandbytes" in sys.modules or hasattr(lora, "Linear4bit"):
        yield
        return
    nothing, layers = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.nn")
    linear = type("Linear4bit", (), {})
    vars(nothing)["nn"], vars(layers)["Linear4bit"] = layers, linear
    vars(lora)["Linear4bit"] = linear
    sys.modules |= {"bitsandbytes": nothing, "bitsandbytes.nn": layers}
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"], sys.modules["bitsandbytes.nn"], vars(lora)["Linear4bit"]


def load_fast(folder: Path, *, dtype: torch.dtype, max_seq_length: int, device: str) -> Any:
    """Load a checkpoint by `FastLanguageModel.from_pretrained`, ready to generate.

    Unsloth must be imported before transformers.
    """
    from unsloth import FastLanguageModel

    with _without_bitsandbytes():
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=max_seq_length,
            dtype=dtype,
            load_in_4bit=False,
            use_gradient_checkpointing=False,
            device_map={"": device},
        )
    return FastLanguageModel.for_inference(model)
