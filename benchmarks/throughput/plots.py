"""Plots of throughput: tokens a second over a workload's size, and what pages gain or lose.

A gain is the ratio of two rows of one result, so both come from one machine and commit.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_paged.errors import InvalidRequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {"max_num_seqs": "requests at once", "input_len": "tokens of a prompt"}


def draw(result: dict[str, Any], path: Path, over: str = "max_num_seqs") -> Path:
    """Draw output tokens per second over one of `AXES`; returns `path`.

    Each backend and value of the other axis has a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    [other] = AXES.keys() - {over}
    several = len({row[other] for row in result["rows"]}) > 1
    for backend, rest in dict.fromkeys((row["backend"], row[other]) for row in result["rows"]):
        points = [
            (row[over], row["output_tokens_per_second"])
            for row in result["rows"]
            if (row["backend"], row[other]) == (backend, rest)
        ]
        label = f"{backend}, {rest} {AXES[other]}" if several else backend
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(AXES[over])
    axes.set_ylabel("output tokens a second")
    axes.set_title(f"{result['model']}, {result['environment']['machine']}")
    return _saved(figure, path)


def _saved(figure: Figure, path: Path) -> Path:
    """Write a plot with its legend, and the folder it needs."""
    for axes in figure.axes:
        axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


SPEEDS = {
    "output_tokens_per_second": ("the whole run", "-"),
    "decode_tokens_per_second": ("decoding", "--"),
}


def gains(
    results: Sequence[dict[str, Any]], backend: str
) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """The speed of `backend` over that of each other one, by prompt length.

    Returns: for `(other backend, kind of speed)` the points `(tokens of a prompt, ratio)`, sorted.
    """
    found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for result in results:
        rows = {
            (row["backend"], row["input_len"], row["max_num_seqs"]): row for row in result["rows"]
        }
        for (other, length, batch), row in rows.items():
            own = rows.get((backend, length, batch))
            if own is None or other == backend:
                continue
            for speed in SPEEDS:
                if own[speed] and row[speed]:
                    found[other, speed].append((length, own[speed] / row[speed]))
    return {key: sorted(points) for key, points in found.items()}


def draw_gains(paths: Sequence[Path], backends: Sequence[str], path: Path) -> Path:
    """Draw how fast a backend is over each other one of results, over prompt length.

    Args:
        paths: results of `bench throughput`.
        backends: the one backend that is compared with the others.
        path: the picture, PNG.

    Raises:
        InvalidRequestError: not one backend, a file that is no result, or no result with rows of
            the backend and of another.
    """
    if len(backends) != 1:
        raise InvalidRequestError(
            f"--plot compares one --backend with the others; got {len(backends)}: name it once"
        )
    [backend] = backends
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    results = []
    for file in paths:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            gains([found], backend)
            found["environment"]["machine"], found["model"]
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise InvalidRequestError(f"{file} is no result of `bench throughput`") from error
        results.append(found)
    lines = gains(results, backend)
    if not lines:
        names = sorted({row["backend"] for result in results for row in result["rows"]})
        raise InvalidRequestError(
            f"--backend {backend}: no result has it beside another backend; there are: "
            f"{', '.join(names) or 'none'}"
        )
    figure = Figure(figsize=(6.4, 4))
    axes = figure.subplots()
    others = list(dict.fromkeys(other for other, _ in lines))
    for (other, speed), points in lines.items():
        what, style = SPEEDS[speed]
        color = f"C{others.index(other)}"
        axes.plot(
            *zip(*points, strict=True), style, marker="o", color=color, label=f"{other}, {what}"
        )
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel(AXES["input_len"])
    axes.set_ylabel(f"times as fast: {backend}")
    axes.set_ylim(bottom=0)
    machines = dict.fromkeys(result["environment"]["machine"] for result in results)
    models = dict.fromkeys(result["model"] for result in results)
    axes.set_title(f"{', '.join(models)}, {', '.join(machines)}, over ...")
    return _saved(figure, path)
