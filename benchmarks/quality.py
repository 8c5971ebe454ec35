"""Reconstruction error of pages on real K and V, layer by layer, and singular-value decay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_paged.benchmarks.environment import environment
from spectral_paged.benchmarks.kv_capture import CapturedKV, capture, text_files
from spectral_paged.codec import decode_pages, encode_pages
from spectral_paged.kernels.layout import BLOCK_TOKENS
from spectral_paged.kernels.rotary import rotate
from spectral_paged.models.loader import load_model
from spectral_paged.page_format import PageFormat

LANDMARKS = 64
QUICK_BLOCKS, FULL_BLOCKS = 4, 12
DECAY_RANKS = (4, 8, 16, 32, 48)
FULL_RANK_ERROR = 0.05  # nothing is left out there, so what remains is rounding to 8 bits


def rank_grid(head_dim: int) -> list[tuple[int, int]]:
    """K and V ranks 16/32, 32/64 and 64/128 of a head of 128, in proportion, in steps of 16."""

    def scaled(rank: int) -> int:
        return min(head_dim, max(16, rank * head_dim // 128 // 16 * 16))

    pairs = [(scaled(k), scaled(v)) for k, v in ((16, 32), (32, 64), (64, 128))]
    return list(dict.fromkeys(pairs))


def blocks_of(x: Tensor) -> Tensor:
    """`[layers, H, tokens, D]` to `[layers, blocks, H, 512, D]`, landmarks left out."""
    x = x[:, :, LANDMARKS:]
    count = x.shape[2] // BLOCK_TOKENS
    return x[:, :, : count * BLOCK_TOKENS].unflatten(2, (count, BLOCK_TOKENS)).transpose(1, 2)


def decay(x: Tensor) -> dict[str, Any]:
    """Energy left out beyond rank r, mean removed: `x` `[blocks, H, 512, D]`."""
    x = x - x.mean(dim=-2, keepdim=True)
    energy = torch.linalg.svdvals(x).square()
    share = energy / energy.sum(-1, keepdim=True)
    left = 1 - share.cumsum(-1).mean(dim=(0, 1))
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1)
    return {
        "energy_left": {r: float(left[r - 1]) for r in DECAY_RANKS if r <= x.shape[-1]},
        "effective_rank": float(entropy.exp().mean()),
        "spectrum": share.mean(dim=(0, 1)).tolist(),
    }


def relative_error(rebuilt: Tensor, x: Tensor) -> float:
    """Frobenius norm of the difference over that of `x`."""
    return float((rebuilt - x).norm() / x.norm())


def attention_error(
    kv: CapturedKV, layer: int, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor
) -> float:
    """Relative error of what the next block's queries read from a block, blocks averaged.

    `k`, `v` and their rebuilt twins are `[blocks, H, 512, D]`, keys before RoPE.
    """
    num_blocks, heads = k.shape[:2]
    errors = []
    for b in range(num_blocks - 1):
        start = LANDMARKS + b * BLOCK_TOKENS
        here = torch.arange(start, start + BLOCK_TOKENS)
        later = here + BLOCK_TOKENS
        cos, sin = kv.rope.rows(later)
        q = rotate(kv.q[layer, :, later], cos[:, 0], sin[:, 0]).unflatten(0, (heads, -1))
        cos, sin = kv.rope.rows(here)

        def read(keys: Tensor, values: Tensor, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned = rotate(keys, cos[:, 0], sin[:, 0]).unsqueeze(1)
            weights = torch.softmax(q @ turned.transpose(-1, -2) * kv.scale, dim=-1)
            return weights @ values.unsqueeze(1)

        want = read(k[b], v[b], q, cos, sin)
        errors.append(relative_error(read(new_k[b], new_v[b], q, cos, sin), want))
    return sum(errors) / len(errors)


def measure(kv: CapturedKV, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Decay and errors of every layer at every pair of ranks."""
    keys, values = blocks_of(kv.k), blocks_of(kv.v)
    layers = [{"k": decay(k), "v": decay(v)} for k, v in zip(keys, values, strict=True)]
    reference = PageFormat.preset("spectral-int8", num_kv_heads=num_kv_heads, head_dim=head_dim)
    formats = []
    for k_rank, v_rank in rank_grid(head_dim):
        format = reference.with_ranks(k_rank, v_rank)
        rows = []
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            new_k, new_v = decode_pages(encode_pages(k, v, format), format)
            if not bool(torch.isfinite(new_k).all() and torch.isfinite(new_v).all()):
                raise ArithmeticError(f"layer {layer} does not come back finite")
            k_error, v_error = relative_error(new_k, k), relative_error(new_v, v)
            for side, rank, error in (("K", k_rank, k_error), ("V", v_rank, v_error)):
                if rank == head_dim and error > FULL_RANK_ERROR:
                    raise ArithmeticError(
                        f"{side} of layer {layer} comes back with relative error {error:.3f} at "
                        f"full rank {rank}; rounding explains at most {FULL_RANK_ERROR}: the "
                        "codec or the capture is wrong"
                    )
            rows.append(
                {
                    "k_error": k_error,
                    "v_error": v_error,
                    "attention_error": attention_error(kv, layer, k, v, new_k, new_v),
                }
            )
        formats.append(
            {"k_rank": k_rank, "v_rank": v_rank, "page_ratio": format.page_ratio, "layers": rows}
        )
    return {"decay": layers, "formats": formats}


def print_table(result: dict[str, Any]) -> None:
    """Per layer: energy beyond the reference ranks, then errors at every pair of ranks."""
    formats = result["formats"]
    head = f"{'layer':>5} | {'K left r16':>10} {'r32':>7} {'eff':>5} | {'V r16':>7} {'r32':>7} "
    head += f"{'eff':>5}"
    for f in formats:
        title = f"{f['k_rank']}/{f['v_rank']} ({f['page_ratio']:.2f}x): K, V, attn"
        head += f" | {title:>24}"
    print(head)
    for i, layer in enumerate(result["decay"]):
        k, v = layer["k"], layer["v"]
        # beyond the width of a head nothing is left
        k16, k32, v16, v32 = (x["energy_left"].get(r, 0.0) for x in (k, v) for r in (16, 32))
        row = f"{i:5d} | {k16:10.4f} {k32:7.4f} {k['effective_rank']:5.1f} | "
        row += f"{v16:7.4f} {v32:7.4f} {v['effective_rank']:5.1f}"
        for f in formats:
            e = f["layers"][i]
            errors = f"{e['k_error']:.4f} {e['v_error']:.4f} {e['attention_error']:.4f}"
            row += f" | {errors:>24}"
        print(row)
    for f in formats:
        means = [
            sum(e[key] for e in f["layers"]) / len(f["layers"])
            for key in ("k_error", "v_error", "attention_error")
        ]
        print(
            f"mean over layers at {f['k_rank']}/{f['v_rank']}: K {means[0]:.4f}, V {means[1]:.4f}, "
            f"attention output {means[2]:.4f}; a page holds {f['page_ratio']:.2f}x"
        )


def plot(result: dict[str, Any], path: Path) -> None:
    """Spectra of every layer above, errors by layer below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    colours = plt.get_cmap("viridis")
    count = len(result["decay"])
    for side, axis in (("k", axes[0][0]), ("v", axes[0][1])):
        for i, layer in enumerate(result["decay"]):
            spectrum = layer[side]["spectrum"]
            axis.semilogy(range(1, len(spectrum) + 1), spectrum, color=colours(i / count), lw=0.8)
        axis.set_title(f"{side.upper()}: share of energy by component (dark: first layers)")
    for key, axis in (("k_error", axes[1][0]), ("v_error", axes[1][1])):
        for f in result["formats"]:
            label = f"{f['k_rank']}/{f['v_rank']}, {f['page_ratio']:.2f}x"
            axis.plot([e[key] for e in f["layers"]], label=label)
        axis.set_title(f"relative error of {key[0].upper()} by layer")
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(*, model: str, texts: Sequence[Path] | None, quick: bool, output_dir: Path) -> int:
    """Measure, print, write `quality-<model>.json` and `.png` to `output_dir`."""
    files = text_files(texts)
    loaded = load_model(model, device=torch.device("cpu"), dtype=torch.float32)
    num_blocks = QUICK_BLOCKS if quick else FULL_BLOCKS
    num_tokens = LANDMARKS + num_blocks * BLOCK_TOKENS
    text, read = "", []
    for file in files:
        text += file.read_text(encoding="utf-8") + "\n"
        read.append(file.name)
        if len(loaded.tokenizer(text)["input_ids"]) >= num_tokens:
            break
    kv = capture(loaded, text, num_tokens)
    geometry = loaded.geometry
    result = {
        "environment": environment(),
        "model": model,
        "texts": read,
        "tokens": num_tokens,
        "num_kv_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        **measure(kv, geometry.num_kv_heads, geometry.head_dim),
    }
    print_table(result)
    output_dir.mkdir(parents=True, exist_ok=True)
    # names have dots of their own (Qwen2.5-0.5B), which are no suffixes
    name = f"quality-{Path(model).name.removesuffix('.gguf')}"
    raw, picture = output_dir / f"{name}.json", output_dir / f"{name}.png"
    raw.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, picture)
    print(f"raw results: {raw}, picture: {picture}")
    return 0
