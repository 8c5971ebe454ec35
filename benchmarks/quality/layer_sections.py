"""Sections of the report below the logits: K and V, attention heads, single layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectral_paged.benchmarks.quality import layer_plots
from spectral_paged.benchmarks.quality.plots import lines
from spectral_paged.benchmarks.quality.tables import (
    Results,
    Section,
    by_ratio,
    cell,
    number,
    times,
)


def average(values: Sequence[float | None]) -> str:
    """The mean as text, or `not finite` if one value is None."""
    good = [x for x in values if x is not None]
    return number(sum(good) / len(good), 3) if good and len(good) == len(values) else "not finite"


def reconstruction(results: Results) -> Section | None:
    if not (table := results.get("reconstruction")):
        return None

    keys = ("k", "v", "random_k", "random_v")
    rows = [[n, times(m["ratio"]), *(average(m[k]) for k in keys)] for n, m in by_ratio(table)]
    return Section(
        "Reconstruction error",
        "Relative error of K (after RoPE) and V, mean over layers. Random matrices of the same "
        "shape are shown only as the warning they are: they have no spectrum to use, and a test "
        "on them says nothing about a model.",
        ["method", "ratio", "K", "V", "K random", "V random"],
        rows,
        lambda path: layer_plots.layer_errors(table, path),
    )


def proposed_exempt(layers: Sequence[float | None]) -> tuple[list[int], float]:
    """Layers worth keeping exact, worst first, and their share of the summed KL.

    These are at most three layers that cost more than three times the mean, because each puts
    1 / layers of the memory back to 2 bytes an element.
    """
    costs = [max(x or 0.0, 0.0) for x in layers]
    total = sum(costs)
    worst = sorted(range(len(costs)), key=lambda i: -costs[i])[:3]
    chosen = [i for i in worst if costs[i] > 3 * total / len(costs)]
    return chosen, sum(costs[i] for i in chosen) / total if total else 0.0


def sensitivity(results: Results) -> Section | None:
    if not (table := results.get("sensitivity")):
        return None
    layers = max(len(m["layers"]) for m in table.values())
    rows = [
        [str(i), *(cell(m["layers"][i]) if i < len(m["layers"]) else "-" for m in table.values())]
        for i in range(layers)
    ]
    series = {name: m["layers"] for name, m in table.items()}
    proposals = []
    for name, costs in series.items():
        chosen, part = proposed_exempt(costs)
        proposals.append(
            f"`{name}`: exempt_layers={chosen} would save {100 * part:.0f} % of the summed KL"
            if chosen
            else f"`{name}`: no layer stands out"
        )
    return Section(
        "Sensitivity of layers",
        "Mean KL with only one layer sealed and all others exact. Layers worth keeping exact cost "
        f"over three times the mean. {'; '.join(proposals)}.",
        ["layer", *table],
        rows,
        lambda path: lines(series, list(range(layers)), "layer sealed", "KL mean", path),
    )


def attention_heads(results: Results) -> Section | None:
    table = {n: m for n, m in (results.get("reconstruction") or {}).items() if heads_of(m)}
    if not table:
        return None
    rows = []
    for name, m in by_ratio(table):
        heads = heads_of(m)
        finite = [[x if x is not None else float("inf") for x in row] for row in heads]
        layers = [sum(row) / len(row) for row in finite]
        error, layer, head = max(
            (x, i, j) for i, row in enumerate(finite) for j, x in enumerate(row)
        )
        rows.append(
            [name, times(m["ratio"]), average([x for row in heads for x in row])]
            + [f"{max(layers):.3f} (layer {layers.index(max(layers))})"]
            + [f"{error:.3f} (layer {layer}, head {head})"]
        )
    return Section(
        "Attention output by layer and head",
        "Relative error of what the next block's queries read from a block, alone, after its "
        "keys and values went through pages; query heads. All numbers are in the JSON.",
        ["method", "ratio", "mean", "worst layer", "worst head"],
        rows,
        lambda path: layer_plots.head_maps({n: heads_of(m) for n, m in by_ratio(table)}, path),
    )


def heads_of(method: Mapping[str, Any]) -> list[list[float | None]]:
    """Errors `[layers][query heads]`; empty if the context had only one block."""
    return [row for row in method.get("attention") or [] if row]


def spectra(results: Results) -> Section | None:
    if not (sides := results.get("spectra")):
        return None
    titles = {"k_pre": "K before RoPE", "k_post": "K after RoPE", "v": "V"}
    ranks = list(sides["v"][0]["left"])
    columns = [f"{t}, {r} left" for t in titles.values() for r in ranks]
    rows = []
    for i in range(len(sides["v"])):
        cells = [f"{sides[s][i]['left'][r]:.3f}" for s in titles for r in ranks]
        rows.append([str(i), *cells, *(f"{sides[s][i]['effective_rank']:.1f}" for s in titles)])
    return Section(
        "Singular values of K and V",
        "Share of a block's energy left beyond so many components (block mean removed, mean over "
        "blocks and KV heads), and the effective rank: the exponential of the spectrum's entropy.",
        ["layer", *columns, *(f"{t}, effective rank" for t in titles.values())],
        rows,
        lambda path: layer_plots.spectra({titles[s]: sides[s] for s in titles}, path),
    )


def needle_tokens(results: Results) -> Section | None:
    if not (table := results.get("needle_tokens")):
        return None
    keys = ("k_needle", "k_all", "v_needle", "v_all", "read")
    rows = [
        [name, times(m["ratio"]), where, *(number(m[where][k], 3) for k in keys)]
        for where in ("synthetic", "real")
        for name, m in by_ratio(table)
    ]
    return Section(
        "Attention-weighted against plain decomposition",
        "Relative errors at the tokens of a needle and of all tokens. Synthetic: one token a block "
        "in a direction of its own, no louder than the others, that half of the last 64 queries "
        "look for; `read` is what these queries read. Real: eight facts in a real text, whose "
        "block does not ask for them; `read` is what the next block's queries read.",
        ["method", "ratio", "needle", "K at needle", "K", "V at needle", "V", "read"],
        rows,
    )
