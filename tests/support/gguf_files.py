"""Small GGUF files of every supported architecture, as llama.cpp's converter writes them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spectral_paged.models.gguf import GGUFFile
from spectral_paged.models.gguf.conversion import Plan, read_plan

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 64, 4, 2, 16, 48, 2
EPS, CONTEXT = 1e-5, 512
SPECIAL = ["<|begin|>", "<|end_of_text|>", "<|user|>", "<tool>"]  # three control, one user's
WORDS = ["th", "▁th", "▁the", "he", "Pa", "▁Pa", "▁Par", "▁Pari", "▁Paris", "▁i", "is", "▁is"]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")


def sentencepiece_keys() -> dict[str, Any]:
    """Keys of a vocabulary with scores: bytes, words, letters, and special tokens at the end."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS]
    scores = [0.0] * 259 + [-1.0 - k for k in range(len(WORDS))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(WORDS)
    for letter in ["▁", *map(chr, range(33, 127))]:
        tokens, scores, types = [*tokens, letter], [*scores, -1000.0 - len(tokens)], [*types, 1]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + SPECIAL,
        "tokenizer.ggml.scores": scores + [0.0] * 4,
        "tokenizer.ggml.token_type": types + [3, 3, 3, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def byte_level_keys() -> dict[str, Any]:
    """Keys of a vocabulary of bytes with two merges, and special tokens at the end."""
    tokens = [*bytes_to_unicode().values(), "he", "ll", *SPECIAL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3, 3, 3, 4],
        "tokenizer.ggml.merges": ["h e", "l l"],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
    }


def model_keys(arch: str) -> dict[str, Any]:
    """Keys of a model: its shapes, and those that only its architecture has."""
    keys = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": EPS,
        "rope.freq_base": 10000.0,
    }
    if arch in ("qwen3", "gemma2", "gemma3"):
        keys |= {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    if arch in ("llama", "phi3"):
        keys |= {"rope.dimension_count": HEAD_DIM}
    if arch in ("gemma2", "gemma3"):
        keys |= {"attention.sliding_window": 128}
    return {f"{arch}.{key}": value for key, value in keys.items()}


def tensors(arch: str, num_tokens: int, *, tied: bool = False, seed: int = 0) -> dict[str, Any]:
    """Random fp32 weights under llama.cpp's names."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    heads, kv_heads = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    norms = ["attn_norm", "ffn_norm"]
    found = {"token_embd.weight": random(num_tokens, HIDDEN), "output_norm.weight": random(HIDDEN)}
    if not tied:
        found["output.weight"] = random(num_tokens, HIDDEN)
    if arch.startswith("gemma"):
        norms += ["post_attention_norm", "post_ffw_norm"]
    for layer in range(LAYERS):
        part = {f"{norm}.weight": random(HIDDEN) for norm in norms}
        part |= {
            "attn_q.weight": random(heads, HIDDEN),
            "attn_k.weight": random(kv_heads, HIDDEN),
            "attn_v.weight": random(kv_heads, HIDDEN),
            "attn_output.weight": random(HIDDEN, heads),
            "ffn_gate.weight": random(MLP, HIDDEN),
            "ffn_up.weight": random(MLP, HIDDEN),
            "ffn_down.weight": random(HIDDEN, MLP),
        }
        if arch == "phi3":
            for name in ("attn_q", "attn_k", "attn_v", "ffn_gate"):
                del part[f"{name}.weight"]
            part["attn_qkv.weight"] = random(heads + 2 * kv_heads, HIDDEN)
            part["ffn_up.weight"] = random(2 * MLP, HIDDEN)
        if arch == "qwen2":
            part |= {"attn_q.bias": random(heads), "attn_k.bias": random(kv_heads)}
            part |= {"attn_v.bias": random(kv_heads)}
        if arch in ("qwen3", "gemma3"):
            part |= {f"attn_{x}_norm.weight": random(HEAD_DIM) for x in "qk"}
        found |= {f"blk.{layer}.{name}": value for name, value in part.items()}
    return found


def write_gguf(
    path: Path,
    arch: str = "llama",
    *,
    tokenizer: Mapping[str, Any] | None = None,
    keys: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    dtype: str = "f32",
    tied: bool = False,
    seed: int = 0,
) -> Path:
    """Write a small model to `path`; returns `path`.

    Args:
        tokenizer: keys of the tokenizer; default `byte_level_keys`.
        keys: changes to all keys; None removes one.
        drop: tensors to leave out; extra: tensors to add or replace.
        dtype: type of matrices: f32, f16, bf16 or q8_0.
    """
    tokenizer = byte_level_keys() if tokenizer is None else tokenizer
    num_tokens = len(tokenizer["tokenizer.ggml.tokens"])
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in {**model_keys(arch), **tokenizer, **(keys or {})}.items():
        if value is not None:
            add_key(writer, key, value)
    weights = tensors(arch, num_tokens, tied=tied, seed=seed) | dict(extra or {})
    for name, value in weights.items():
        if name not in drop:
            add_tensor(writer, name, value, dtype if value.ndim > 1 else "f32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp's converter gives such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray, dtype: str) -> None:
    if dtype == "f32":
        writer.add_tensor(name, value)
    elif dtype == "f16":
        writer.add_tensor(name, value.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


@functools.cache
def whole_files() -> dict[str, Path]:
    """A file of each architecture; tests change the metadata read from it, never the file."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {arch: write_gguf(folder / f"{arch}.gguf", arch) for arch in ARCHITECTURES}


def plan_of(arch: str, keys: Mapping[str, Any]) -> Plan:
    """The plan of a file of `arch` with changed keys; None removes one."""
    file = GGUFFile(whole_files()[arch])
    file.metadata |= keys
    file.metadata = {key: value for key, value in file.metadata.items() if value is not None}
    return read_plan(file)
