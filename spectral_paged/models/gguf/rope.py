"""RoPE parameters of transformers from a GGUF file's keys and factor tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from spectral_paged.errors import CorruptFileError, UnsupportedModelError, shown
from spectral_paged.models.gguf.file import GGUFFile
from spectral_paged.models.gguf.keys import REMEDY, Keys

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
YARN_ALONE = ("yarn_ext_factor", "yarn_log_multiplier", "yarn_beta_fast", "yarn_beta_slow")
# The scaling of Llama 3.1 to 3.3 and of models that copied it; the factor is 8 or 32.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_parameters(
    file: GGUFFile, keys: Keys, *, head_dim: int, context: int, theta: float = 10000.0
) -> dict[str, Any]:
    """The rope_parameters of a transformers config that turn keys as llama.cpp turns them.

    Args:
        theta: llama.cpp's base where the file names none.

    Raises:
        UnsupportedModelError: transformers has no such scaling; the message names the key.
    """
    theta = keys.number("rope.freq_base", theta)
    kind = keys.string("rope.scaling.type", "linear")  # llama.cpp's default, without a factor
    old = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", 0.0) or old or 1.0
    original = keys.integer("rope.scaling.original_context_length", context, least=1)
    keys.skip("rope.scaling.finetuned")  # a fact about training
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    attention *= keys.number("rope.scaling.yarn_attn_factor", 1.0)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "yarn":
        found |= _yarn(keys, factor, original, attention)
    elif kind in ("none", "linear"):
        if kind == "linear" and factor != 1.0:
            found |= {"rope_type": "linear", "factor": factor}
        for name in ("attn_factor", "yarn_attn_factor"):
            keys.expect(f"rope.scaling.{name}", 1.0, why="its RoPE scales attention scores")
        keys.skip(*(f"rope.scaling.{name}" for name in YARN_ALONE))
    else:
        raise UnsupportedModelError(
            f"{file.path}: {keys.prefix}rope.scaling.type is {shown(kind)}; served are none, "
            f"linear, yarn and the factors of Llama 3: {REMEDY}"
        )
    _refuse_factors_by_length(file)
    if FACTORS in file.tensors:
        if found["rope_type"] != "default":
            raise UnsupportedModelError(
                f"{file.path} has {FACTORS} and a RoPE scaled by {kind}, which transformers cannot "
                f"do at once: {REMEDY}"
            )
        found |= _llama3(file, theta, head_dim)
    return found


def _yarn(keys: Keys, factor: float, original: int, attention: float) -> dict[str, Any]:
    """The parameters of YaRN; the attention factor is the file's times YaRN's own."""
    keys.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0, why="YaRN mixes frequencies otherwise")
    keys.expect("rope.scaling.yarn_log_multiplier", 0.0, why="YaRN scales scores otherwise")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if attention != 1.0:
        found["attention_factor"] = attention * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    return found


def _refuse_factors_by_length(file: GGUFFile) -> None:
    if found := [name for name in (LONG, SHORT) if name in file.tensors]:
        raise UnsupportedModelError(
            f"{file.path} has {' and '.join(found)} (longrope): which of them turns a key depends "
            f"on the sequence's length, so pages could not be shared: {REMEDY} of the version with "
            "a short context (4k)"
        )


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3's scaling whose factors are those of the file's tensor.

    Raises:
        UnsupportedModelError: no parameters give these factors.
        CorruptFileError: the tensor does not have `head_dim / 2` positive numbers.
    """
    given = file.read(FACTORS)
    if given.shape != (head_dim // 2,) or not np.isfinite(given).all() or not (given > 0).all():
        raise CorruptFileError(
            f"{file.path}: {FACTORS} has shape {list(given.shape)}; {head_dim // 2} positive "
            f"factors are needed: fetch the file again, or {REMEDY}"
        )
    if (given == 1.0).all():
        return {}
    factor = float(given.max())
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = LLAMA3["original_max_position_embeddings"] / waves
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(given, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{file.path}: {FACTORS} holds factors {shown(given)} that are not those of Llama 3 "
            f"(up to {factor:g}, from {LLAMA3['original_max_position_embeddings']} tokens), and "
            f"transformers has no other: {REMEDY}"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
