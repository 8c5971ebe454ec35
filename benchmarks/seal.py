"""`spectral-paged bench seal`: the time to seal a block beside the time of its prefill.

The blocks are those of all layers of an 8B-shaped model, with made-up K and V. The benchmark
measures speed, counts operations and compares the kernel with its twin; quality is not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import write_result
from spectral_paged.conformance.inputs import structured_blocks, toy_calibration
from spectral_paged.device import choose_device
from spectral_paged.kernels.math.rotary import stored_keys
from spectral_paged.kernels.ops import SealKernel, page_ops
from spectral_paged.kernels.page.layout import (
    BLOCK_TOKENS,
    EXACT_PAGE_TOKENS,
    UNIT_BYTES,
    exact_page_bytes,
)
from spectral_paged.pages import PRESETS, BoundBasis, PageFormat, decode_pages, encode_pages
from spectral_paged.rope import RotaryTable

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
BATCHES = (1, 8, 32)
WORST_RATIO = 1.02  # the kernel's error over the twin's
PAGES_PER_BLOCK = BLOCK_TOKENS // EXACT_PAGE_TOKENS


@dataclass(frozen=True)
class Row:
    """The measurement of one format, encoder and batch; times are of a block in all layers."""

    format: str
    fingerprint: str
    encoder: str  # triton: the seal kernel; torch: `encode_pages`
    blocks: int
    ms_per_block: float
    gflop_per_block: float  # of matrix products
    gigabytes_per_second: float  # K and V read once, pages written once
    error_ratio: float  # largest error of K or V over the twin's
    prefill_share: float | None = None


def product_operations(format: PageFormat) -> int:
    """Floating-point operations of the batched products that encode a block in all layers."""
    dim, total = format.head_dim, 0
    for rank in (format.k_rank, format.v_rank):
        weight = 2 * BLOCK_TOKENS * dim * dim if format.dim_weighting != "none" else 0
        project = 2 * BLOCK_TOKENS * dim * rank
        gram = 2 * BLOCK_TOKENS * dim * dim if format.basis == "page" else 0
        total += weight + project + gram
    return total * format.num_kv_heads * NUM_LAYERS


def prefill_operations() -> int:
    """Floating-point operations of the linear layers for one block of tokens."""
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


class Blocks:
    """Blocks of every layer in exact pages of one arena, and the pages reserved for them."""

    def __init__(self, format: PageFormat, count: int, device: torch.device) -> None:
        self.device, self.count = device, count
        self.kinds = [x.bfloat16() for x in structured_blocks(4, format, device)]
        self.bound: BoundBasis | None = None
        if format.needs_calibration:
            k, v = (x.float() for x in self.kinds)
            self.bound = toy_calibration(format, k, v, num_layers=NUM_LAYERS)
            format = self.bound.format
        self.format = format
        self.rope = RotaryTable.from_theta(5e5, HEAD_DIM, max_positions=20000, device=device)
        size = exact_page_bytes(NUM_KV_HEADS, HEAD_DIM, 2)
        num_exact = count * PAGES_PER_BLOCK
        self.start = num_exact * size
        self.arena = torch.zeros(
            NUM_LAYERS, self.start + count * format.page_bytes, dtype=torch.uint8, device=device
        )
        shape = (NUM_LAYERS, count, PAGES_PER_BLOCK, NUM_KV_HEADS, 2, EXACT_PAGE_TOKENS, HEAD_DIM)
        pages = self.arena[:, : self.start].view(torch.bfloat16).view(shape)
        for layer in range(NUM_LAYERS):
            for block in range(count):
                for side, x in enumerate(self.block(layer, block)):
                    rows = x.unflatten(1, (PAGES_PER_BLOCK, EXACT_PAGE_TOKENS)).transpose(0, 1)
                    pages[layer, block, :, :, side] = rows
        index = torch.arange(count, device=device)
        self.exact = (torch.arange(num_exact, device=device) * size // UNIT_BYTES).int()
        self.exact = self.exact.view(count, PAGES_PER_BLOCK)
        self.pages = ((self.start + index * format.page_bytes) // UNIT_BYTES).int()
        self.first = (format.num_landmark_tokens + BLOCK_TOKENS * index).int()

    def block(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """K after RoPE and V, bf16 `[H, 512, D]`."""
        k, v = (x[(layer + 3 * block) % 4] for x in self.kinds)
        return k, v

    def stored(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """K and V of a block as the page should represent them, fp32 `[1, H, 512, D]` each."""
        k, v = (x.float().unsqueeze(0) for x in self.block(layer, block))
        span = slice(int(self.first[block]), int(self.first[block]) + BLOCK_TOKENS)
        return stored_keys(k, self.rope.cos[span], self.rope.sin[span], self.format.rope), v

    def kernel(self, op: SealKernel, **options: Any) -> Callable[[], Tensor]:
        """A call that seals all blocks in the arena with `op`; `options` are further arguments."""
        assert self.bound is not None
        options |= self.bound.projections(range(NUM_LAYERS))
        return lambda: op(
            self.arena,
            self.exact,
            self.pages,
            self.first,
            layout=self.format.layout,
            dtype=torch.bfloat16,
            cos=self.rope.cos,
            sin=self.rope.sin,
            **options,
        )

    def twin(self) -> Callable[[], Tensor]:
        """A call that encodes all blocks with torch, without reading, rotating and writing them."""
        layers = list(range(NUM_LAYERS)) * self.count
        sides = [
            self.stored(layer, block) for block in range(self.count) for layer in range(NUM_LAYERS)
        ]
        k, v = (torch.cat([pair[side] for pair in sides]) for side in range(2))
        return lambda: encode_pages(k, v, self.format, basis=self.bound, layers=layers)

    def error_ratio(self, page: Callable[[int, int], Tensor]) -> float:
        """Largest ratio of the error of `page(layer, block)` to the twin's, over two blocks."""
        worst = 0.0
        for layer, block in {(0, 0), (NUM_LAYERS - 1, self.count - 1)}:
            given = self.stored(layer, block)
            twin = encode_pages(*given, self.format, basis=self.bound, layers=[layer])
            errors = []
            for pages in (page(layer, block), twin):
                rebuilt = decode_pages(pages, self.format, basis=self.bound, layers=[layer])
                errors.append(
                    [float((x - y).norm() / y.norm()) for x, y in zip(rebuilt, given, strict=True)]
                )
            worst = max(worst, *(a / b for a, b in zip(*errors, strict=True)))
        return worst

    def sealed(self, layer: int, block: int) -> Tensor:
        """The bytes of a block's page in the arena, uint8 `[1, page_bytes]`."""
        start = self.start + block * self.format.page_bytes
        return self.arena[layer : layer + 1, start : start + self.format.page_bytes].contiguous()

    def row(self, encoder: str, took: float, ratio: float) -> Row:
        if ratio > WORST_RATIO:
            raise ArithmeticError(
                f"{self.format.name}: pages of {encoder} have {ratio:.3f} times the twin's error; "
                "not timed"
            )
        size = BLOCK_TOKENS * NUM_KV_HEADS * HEAD_DIM * 4 + self.format.page_bytes
        return Row(
            self.format.name,
            self.format.fingerprint,
            encoder,
            self.count,
            took * 1e3 / self.count,
            product_operations(self.format) / 1e9,
            size * NUM_LAYERS * self.count / took / 1e9,
            ratio,
        )


def measure(name: str, count: int, device: torch.device, repeats: int) -> list[Row]:
    """Rows of preset `name` for `count` blocks a layer: the kernel, and for one block the twin."""
    format = PageFormat.preset(name, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
    op, rows = page_ops(device).seal_kernel(format.layout), []
    if count > 1 and op is None:
        return []
    blocks = Blocks(format, count, device)
    if op is not None:
        work = blocks.kernel(op)
        work()
        ratio = blocks.error_ratio(blocks.sealed)
        rows.append(blocks.row("triton", seconds(work, device, repeats), ratio))
    if count == 1:
        twin = blocks.twin()
        pages = twin()
        ratio = blocks.error_ratio(lambda layer, block: pages[layer : layer + 1])
        rows.append(blocks.row("torch", seconds(twin, device, 1), ratio))
    return rows


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


def main(*, device: str, output_dir: Path, formats: tuple[str, ...] = (), repeats: int = 5) -> int:
    """Measure every preset, print a table, write `seal-<device>.json`."""
    where = choose_device(device)
    cuda = where.type == "cuda"
    prefill = prefill_ms(where, repeats) if cuda else None
    rows = [
        row
        for name in formats or PRESETS
        if name != "exact"
        for count in (BATCHES if cuda else (1,))
        for row in measure(name, count, where, repeats)
    ]
    print(f"8B shape, 512 tokens: {prefill_operations() / 1e12:.2f} TFLOP of linear layers", end="")
    print(f", prefill {prefill:.1f} ms" if prefill else ", prefill not timed on a CPU")
    found = []
    for row in rows:
        share = ""
        values = asdict(row)
        if prefill:
            values["prefill_share"] = row.ms_per_block / prefill
            share = f"{100 * row.ms_per_block / prefill:7.1f} % of prefill"
        found.append(values)
        print(
            f"{row.format:20} {row.encoder:6} {row.blocks:3} blocks: {row.ms_per_block:8.2f} ms a "
            f"block, {row.gflop_per_block:5.1f} GFLOP of products, "
            f"{row.gigabytes_per_second:6.0f} GB/s, error {row.error_ratio:.4f} of the twin's"
            f"{share}"
        )
    result = {
        "environment": environment(),
        "shape": SHAPE_8B,
        "prefill_ms": prefill,
        "prefill_tflop": prefill_operations() / 1e12,
        "rows": found,
    }
    path = write_result(output_dir, f"seal-{where.type}", result)
    print(f"raw results: {path}")
    return 0
