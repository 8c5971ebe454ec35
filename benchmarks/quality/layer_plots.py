"""Pictures of errors, attention heads and spectra by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectral_paged.benchmarks.quality.plots import figure


def layer_errors(table: Mapping[str, Any], path: Path) -> None:
    """Draw the relative errors of K and of V by layer; dotted lines are random matrices."""
    drawing, axes = figure(12, 5, 1, 2)
    for ax, side in zip(axes[0], ("k", "v"), strict=True):
        for i, (name, m) in enumerate(table.items()):
            colour = f"C{i % 10}"
            shown = [x if x is not None else float("nan") for x in m[side]]
            noise = [x if x is not None else float("nan") for x in m[f"random_{side}"]]
            ax.plot(shown, color=colour, marker="o", markersize=2, label=name)
            ax.plot(noise, color=colour, linestyle=":", alpha=0.4)
        ax.set_title(f"{side.upper()} by layer (dotted: random matrices, a warning)", fontsize=9)
        ax.set_xlabel("layer")
        ax.set_ylabel("relative error")
        ax.set_yscale("log")
        ax.grid(True, which="both", alpha=0.2)
    if table:
        axes[0][0].legend(fontsize=6)
    drawing.savefig(path, dpi=130)


def head_maps(
    table: Mapping[str, Sequence[Sequence[float | None]]], path: Path, columns: int = 3
) -> None:
    """Draw a map of heads by layers for every method, all with one scale of colours."""
    rows = -(-len(table) // columns)
    drawing, axes = figure(4 * columns, 2.4 * rows, rows, columns)
    cells = [ax for row in axes for ax in row]
    finite = [x for heads in table.values() for row in heads for x in row if x is not None]
    top = max(finite, default=1.0)
    for ax, (name, heads) in zip(cells, table.items(), strict=False):
        grid = [[x if x is not None else float("nan") for x in row] for row in heads]
        turned = list(zip(*grid, strict=True))
        image = ax.imshow(turned, vmin=0, vmax=min(top, 1.0), cmap="viridis", aspect="auto")
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=6)
    for ax in cells[len(table) :]:
        ax.axis("off")
    drawing.colorbar(image, ax=cells, shrink=0.6)
    drawing.supxlabel("layer", fontsize=8)
    drawing.supylabel("query head", fontsize=8)
    drawing.savefig(path, dpi=130)


def spectra(sides: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the share of energy by component, a line a layer; first layers are dark."""
    from matplotlib import colormaps

    drawing, axes = figure(5 * len(sides), 4.5, 1, len(sides))
    for ax, (title, layers) in zip(axes[0], sides.items(), strict=True):
        for i, layer in enumerate(layers):
            shares = [max(x, 1e-9) for x in layer["spectrum"]]
            colour = colormaps["viridis"](i / len(layers))
            ax.semilogy(range(1, len(shares) + 1), shares, color=colour, linewidth=0.8)
        ax.set_title(f"{title}: share of energy (dark: first layers)", fontsize=9)
        ax.set_xlabel("component")
        ax.grid(True, which="both", alpha=0.2)
        ax.sharey(axes[0][0])
    drawing.savefig(path, dpi=130)
