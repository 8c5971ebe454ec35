"""The report of `bench decode`: a table, bandwidth by workload, and KL against milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_paged.benchmarks.results_io.result_file import write_result
from spectral_paged.errors import CorruptFileError

HEAD = (
    "| work | what | part | ms | GB/s | of bf16 | error | KL |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def kl_text(kl: dict[str, float] | None) -> str:
    """The table cell of KL by model."""
    return ", ".join(f"{model} {value:.4f}" for model, value in (kl or {}).items()) or "-"


def markdown(result: dict[str, Any]) -> str:
    """The report's text; rows of formats whose quality was not measured are left out."""
    env = result["environment"]
    lines = [
        "# Decode attention over pages",
        "",
        f"{result['gpu']}, date {env['date']}, commit {env['commit']}, torch {env['torch']}. Times "
        "are medians of replayed CUDA graphs. Bytes are those of pages and exact tokens alone. "
        "`of bf16` is against the fastest bf16 kernel of the run and work; `error` is relative "
        "to the fp32 twin on pages that the codec wrote; KL is what `bench quality` found.",
    ]
    if result.get("notes"):
        lines += ["", *result["notes"]]
    rows = [r for r in result["rows"] if r["error"] is None or r["kl"]]
    for shape in dict.fromkeys(r["shape"] for r in rows):
        lines += ["", f"## {shape}", "", HEAD.rstrip()]
        for r in rows:
            if r["shape"] == shape:
                error = "-" if r["error"] is None else f"{r['error']:.0e}"
                lines.append(
                    f"| {r['work']} | {r['what']} | {r['part']} | {r['ms']:.4f} | "
                    f"{r['gigabytes_per_second']:.0f} | {r['speedup']:.2f}x | {error} | "
                    f"{kl_text(r['kl'])} |"
                )
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw `decode-bandwidth.png` and `decode-kl.png` of the first shape; returns their paths."""
    from matplotlib.figure import Figure

    shape = result["rows"][0]["shape"]
    rows = [r for r in result["rows"] if r["shape"] == shape and (r["error"] is None or r["kl"])]
    works = list(dict.fromkeys(r["work"] for r in rows))
    pages = [r for r in rows if r["part"] == "pages"]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for what in dict.fromkeys(r["what"] for r in pages):
        found = {r["work"]: r["gigabytes_per_second"] for r in pages if r["what"] == what}
        axes.plot([works.index(w) for w in found], list(found.values()), marker="o", label=what)
    fastest = max(r["gigabytes_per_second"] for r in pages)
    axes.axhline(fastest, color="gray", linestyle=":", label="most that any kernel read")
    axes.set_xticks(range(len(works)), works, rotation=15)
    axes.set_ylabel("GB/s of real bytes")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{shape} on {result['gpu']}")
    axes.legend(fontsize=8)
    bandwidth = folder / "decode-bandwidth.png"
    figure.savefig(bandwidth, dpi=110)

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    chosen = [r for r in rows if r["work"] == works[0] and r["part"] == "attend"]
    for r in chosen:
        for model, kl in (r["kl"] or {}).items():
            axes.scatter(r["ms"], kl)
            axes.annotate(f"{r['what']}, {model}", (r["ms"], kl), fontsize=7)
    bf16 = min((r["ms"] for r in rows if r["work"] == works[0] and r["error"] is None), default=0)
    axes.axvline(bf16, color="gray", linestyle=":", label="fastest bf16, KL 0")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"ms of the whole attend op, {works[0]}")
    axes.set_ylabel("KL(exact || format), nats a token")
    axes.legend(fontsize=8)
    divergence = folder / "decode-kl.png"
    figure.savefig(divergence, dpi=110)
    return [bandwidth, divergence]


def read(path: Path) -> dict[str, Any]:
    """Read a result of `bench decode`.

    Raises:
        CorruptFileError: the file is missing or damaged.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows: Sequence[Any] = result["rows"]
        assert rows
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise CorruptFileError(
            f"{path} is no result of `bench decode` ({error}): measure first"
        ) from error
    return dict(result)


def write_rows(result: dict[str, Any], folder: Path) -> Path:
    """Write `decode.json` only, after each workload, so that a time limit loses nothing."""
    return write_result(folder, "decode", result)


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write `decode.json`, `decode.md` and the pictures; returns their paths."""
    raw, text = write_rows(result, folder), folder / "decode.md"
    text.write_text(markdown(result), encoding="utf-8")
    return [raw, text, *draw(result, folder)]
