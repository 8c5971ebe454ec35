"""What encoding costs: one block of all layers of an 8B-shaped model against its own prefill.

Random K and V: this measures speed and counts operations, it says nothing about quality.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_paged.benchmarks.environment import environment
from spectral_paged.codec import decode_pages, encode_pages
from spectral_paged.kernels.layout import BLOCK_TOKENS
from spectral_paged.page_format import PageFormat
from spectral_paged.placement import choose_device
from spectral_paged.presets import PRESETS
from spectral_paged.shared_basis import BasisAccumulator, BoundBasis

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPE_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 128256,
}
WORST_ERROR = 0.75  # of K or V on white noise, which the narrowest preset truncates and rounds


def product_operations(format: PageFormat, num_pages: int) -> int:
    """Floating-point operations of the batched products that encode `num_pages` pages."""
    dim, total = format.head_dim, 0
    for rank in (format.k_rank, format.v_rank):
        weight = 2 * BLOCK_TOKENS * dim * dim if format.dim_weighting != "none" else 0
        project = 2 * BLOCK_TOKENS * dim * rank
        gram = 2 * BLOCK_TOKENS * dim * dim if format.basis == "page" else 0
        total += weight + project + gram
    return total * format.num_kv_heads * num_pages


def prefill_operations() -> int:
    """Of the linear layers for one block of tokens."""
    s = SHAPE_8B
    attention = 2 * s["hidden_size"] * HEAD_DIM * (s["num_attention_heads"] + NUM_KV_HEADS)
    layer = attention + 3 * s["hidden_size"] * s["intermediate_size"]
    return 2 * BLOCK_TOKENS * layer * NUM_LAYERS


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `work`, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2]


def random_basis(format: PageFormat, k: Tensor, v: Tensor) -> BoundBasis | None:
    """A calibration of the random blocks themselves, with plain metrics."""
    if not format.needs_calibration:
        return None
    accumulator = BasisAccumulator(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM)
    first = slice(NUM_LAYERS)
    keys = {f"k_{rope}": k[first] for rope in ("pre", "frame", "post")}
    accumulator.add(range(NUM_LAYERS), v=v[first], **keys)
    plain = torch.eye(HEAD_DIM).expand(NUM_LAYERS, NUM_KV_HEADS, -1, -1)
    basis = accumulator.finish(q_pre=plain, q_post=plain, o=plain, model_fingerprint="random")
    return basis.bind(format, k.device)


def measure(name: str, num_blocks: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time and operations of preset `name` for `num_blocks` blocks of every layer."""
    format = PageFormat.preset(name, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (num_blocks * NUM_LAYERS, NUM_KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    k, v = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(2))
    basis = random_basis(format, k, v)
    layers = list(range(NUM_LAYERS)) * num_blocks
    format = format if basis is None else basis.format

    def encode() -> Tensor:
        return encode_pages(k, v, format, basis=basis, layers=layers)

    pages = encode()[:2]
    rebuilt = decode_pages(pages, format, basis=basis, layers=layers[:2])
    given = (k[:2].float(), v[:2].float())
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(rebuilt, given, strict=True)]
    limit = WORST_ERROR if format.basis == "shared" else 1.0  # half of white noise is left out
    alone = encode_pages(k[1:2], v[1:2], format, basis=basis, layers=layers[1:2])
    if not torch.equal(alone[0], pages[1]) or max(errors) > limit:
        raise ArithmeticError(
            f"{name} came back with errors {errors}, or with other bytes in a batch: not timed"
        )
    took = seconds(encode, device, repeats)
    operations = product_operations(format, num_blocks * NUM_LAYERS)
    return {
        "format": name,
        "fingerprint": format.fingerprint,
        "blocks": num_blocks,
        "ms_per_block": took * 1e3 / num_blocks,
        "product_gflop_per_block": operations / num_blocks / 1e9,
        "errors": errors,
    }


@torch.inference_mode()
def prefill_ms(device: torch.device, repeats: int) -> float:
    """Milliseconds of a 512-token prefill step of an 8B-shaped llama with random bf16 weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE_8B, dtype=torch.bfloat16)).model.bfloat16()
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    with device:
        model.rotary_emb = type(model.rotary_emb)(model.config)
    ids = torch.randint(1000, (1, BLOCK_TOKENS), device=device)
    return seconds(lambda: model(input_ids=ids, use_cache=False), device, repeats) * 1e3


def main(*, device: str, output_dir: Path, repeats: int = 5) -> int:
    """Measure every preset, print a table, write `encode-<device>.json`."""
    where = choose_device(device)
    cuda = where.type == "cuda"
    prefill = prefill_ms(where, repeats) if cuda else None
    rows = [
        measure(name, blocks, where, repeats)
        for name in PRESETS
        if name != "exact"
        for blocks in ((1, 8) if cuda else (1,))
    ]
    print(f"8B shape, 512 tokens: {prefill_operations() / 1e12:.2f} TFLOP of linear layers", end="")
    print(f", prefill {prefill:.1f} ms" if prefill else ", prefill not timed on a CPU")
    for row in rows:
        share = f"{100 * row['ms_per_block'] / prefill:6.1f} % of prefill" if prefill else ""
        print(
            f"{row['format']:20} {row['blocks']} blocks: {row['ms_per_block']:8.2f} ms a block, "
            f"{row['product_gflop_per_block']:6.1f} GFLOP of products {share}"
        )
    result = {
        "environment": environment(),
        "shape": SHAPE_8B,
        "prefill_ms": prefill,
        "prefill_tflop": prefill_operations() / 1e12,
        "rows": rows,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"encode-{where.type}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"raw results: {path}")
    return 0
