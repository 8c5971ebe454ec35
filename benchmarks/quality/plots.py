"""Pictures of a results value, drawn by matplotlib without a screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Tallies = Mapping[str, Mapping[str, Sequence[int]]]  # by length, by depth: [right, asked]
COLOURS = {
    "spectral": "tab:blue",
    "fp8": "tab:red",
    "int": "tab:orange",
    "kivi": "tab:green",
    "rotated": "tab:purple",
    "exact": "black",
}


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, squeeze=False)


def pareto(methods: Mapping[str, Any], path: Path) -> None:
    """Draw KL over ratio, every method labelled; a line joins those that no other beats."""
    drawing, axes = figure(9, 6)
    pareto_panel(axes[0][0], methods)
    drawing.savefig(path, dpi=130)


def pareto_of_models(results: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw a panel of `pareto` for each `(model, methods)`, all with one scale of KL."""
    drawing, axes = figure(7.5 * len(results), 6, 1, len(results))
    for ax, (model, methods) in zip(axes[0], results, strict=True):
        pareto_panel(ax, methods)
        ax.set_title(model)
    limits = [ax.get_ylim() for ax in axes[0]]
    for ax in axes[0]:
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    drawing.savefig(path, dpi=130)


def pareto_panel(ax: Any, methods: Mapping[str, Any]) -> None:
    points = [
        (m["ratio"], max(m["kl"], 1e-7), name, m["family"])
        for name, m in methods.items()
        if m["kl"] is not None and m["ratio"] and m["family"] != "exact"
    ]
    seen = set()
    for ratio, kl, name, family in sorted(points):
        label = family if family not in seen else None
        seen.add(family)
        ours = family == "spectral"
        ax.scatter(
            ratio,
            kl,
            color=COLOURS.get(family, "gray"),
            label=label,
            zorder=3,
            marker="*" if ours else "o",
            s=150 if ours else 25,
        )
        ax.annotate(
            name,
            (ratio, kl),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=9 if ours else 7,
            fontweight="bold" if ours else "normal",
        )
    front = [p for p in points if not any(beats(q, p) for q in points)]
    if front:
        ax.plot(*zip(*[(r, kl) for r, kl, *_ in sorted(front)], strict=True), color="lightgray")
    ax.set_yscale("log")
    ax.set_xlabel("times smaller than 2 bytes an element (sealed tokens)")
    ax.set_ylabel("KL(exact || method), mean nats a token")
    ax.grid(True, which="both", alpha=0.2)
    if points:
        ax.set_xlim(right=max(ratio for ratio, *_ in points) * 1.2)  # room for the last label
        ax.legend(fontsize=8)


def beats(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """True if point `a` is as good as `b` in ratio and KL and better in one."""
    return a[0] >= b[0] and a[1] <= b[1] and a[:2] != b[:2]


def lines(
    series: Mapping[str, Sequence[float | None]],
    at: Sequence[float],
    xlabel: str,
    ylabel: str,
    path: Path,
) -> None:
    """Draw one line a name over `at`, with a logarithmic y axis; None leaves a gap."""
    drawing, axes = figure(9, 5.5)
    ax = axes[0][0]
    for name, values in series.items():
        if any(v for v in values):
            shown = [max(v, 1e-8) if v is not None else float("nan") for v in values]
            ax.plot(at[: len(shown)], shown, marker="o", markersize=3, label=name)
    ax.set_yscale("log")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(True, which="both", alpha=0.2)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=6, ncols=2)
    drawing.savefig(path, dpi=130)


def depth_grid(
    by_length: Tallies, depths: Sequence[str], lengths: Sequence[str]
) -> list[list[float]]:
    """The share of facts recalled, `[depths, lengths]`; NaN where none was asked."""

    def recalled(depth: str, length: str) -> float:
        right, asked = by_length.get(length, {}).get(depth, (0, 0))
        return right / asked if asked else float("nan")

    return [[recalled(depth, length) for length in lengths] for depth in depths]


def needle_maps(summary: Mapping[str, Any], path: Path, columns: int = 4) -> None:
    """Draw a map of depths by lengths for every method, all families of needles together."""
    methods = list(summary["methods"].items())
    rows = max(1, -(-len(methods) // columns))
    drawing, axes = figure(3.2 * columns, 2.6 * rows, rows, columns)
    cells = [ax for row in axes for ax in row]
    asked = added(summary["exact"]["by_depth"].values())
    lengths = sorted(asked, key=int)
    depths = sorted({d for by_depth in asked.values() for d in by_depth}, key=float)
    for ax, (name, method) in zip(cells, methods, strict=False):
        grid = depth_grid(added(method["by_depth"].values()), depths, lengths)
        ax.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", alpha=0.7, aspect="auto")
        ax.set_xticks(range(len(lengths)), lengths, fontsize=6)
        ax.set_yticks(range(len(depths)), [f"{float(d):.2f}" for d in depths], fontsize=6)
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                text = "" if value != value else f"{100 * value:.0f}"
                ax.text(x, y, text, ha="center", va="center", fontsize=6)
        ax.set_title(name, fontsize=8)
    for ax in cells[len(methods) :]:
        ax.axis("off")
    drawing.supxlabel("context tokens", fontsize=8)
    drawing.supylabel("depth of the fact", fontsize=8)
    drawing.savefig(path, dpi=130)


def added(families: Iterable[Tallies]) -> dict[str, dict[str, list[int]]]:
    """Tallies `[right, asked]` by length and depth, summed over families."""
    total: dict[str, dict[str, list[int]]] = {}
    for family in families:
        for length, by_depth in family.items():
            for depth, (right, asked) in by_depth.items():
                pair = total.setdefault(length, {}).setdefault(depth, [0, 0])
                pair[0] += right
                pair[1] += asked
    return total
