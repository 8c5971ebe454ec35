"""Tables and plots of `bench store`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectral_paged.benchmarks.results_io.text_table import table

GIGA = 1e9


def _rows(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["kind"] == kind]


def summary(result: dict[str, Any]) -> str:
    """The tables of a result, and how fast its disk is."""
    disk = result["disk"]
    lines = [
        f"disk: writes {disk['write_bytes_per_second'] / GIGA:.2f} GB/s, reads "
        f"{disk['read_bytes_per_second'] / GIGA:.2f} GB/s, from the system's memory "
        f"{disk['cached_read_bytes_per_second'] / GIGA:.2f} GB/s",
        f"answers compared with those of computed prompts; {result['ties']} part at a tie",
    ]
    if first := _rows(result, "FirstToken"):
        cold = {row["input_len"]: min(row["seconds"]) for row in first if row["source"] == "cold"}
        lines.append(
            table(
                [
                    ["prompt", "from", "ttft ms", "of cold", "load MB", "load GB/s"],
                    *(
                        [
                            f"{row['input_len']:,}",
                            row["source"],
                            f"{1e3 * min(row['seconds']):.1f}",
                            f"{min(row['seconds']) / cold[row['input_len']]:.3f}",
                            f"{row['load_bytes'] / 1e6:.1f}",
                            f"{row['load_bytes'] / row['load_seconds'] / GIGA:.2f}"
                            if row["load_seconds"]
                            else "-",
                        ]
                        for row in first
                    ),
                ]
            )
        )
    for row in _rows(result, "Held"):
        ratio = row["exact_bytes"] / max(1, row["bytes"])
        lines.append(
            f"{row['tokens']:,} tokens of prompts of {row['input_len']:,} in "
            f"{row['bytes'] / GIGA:.3f} GB of host memory: {ratio:.2f} times those of exact"
        )
    if served := _rows(result, "Row"):
        lines.append(_served(served))
    return "\n".join(lines)


def totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The seconds of all rounds, by store."""
    found: dict[str, float] = {}
    for row in rows:
        found[row["store"]] = found.get(row["store"], 0.0) + row["seconds"]
    return found


def _served(rows: list[dict[str, Any]]) -> str:
    heading = [
        "store",
        "round",
        "s",
        "tokens/s",
        "ttft p50 ms",
        "itl p50",
        "p99",
        "hits",
        "dropped",
    ]
    lines = [heading]
    for row in rows:
        moved = row["moved"]
        lines.append(
            [
                row["store"],
                str(row["round"]),
                f"{row['seconds']:.2f}",
                f"{row['prompt_tokens'] / row['seconds']:,.0f}",
                *(_ms(row["ttft_ms"]["p50"]), _ms(row["itl_ms"]["p50"]), _ms(row["itl_ms"]["p99"])),
                " ".join(f"{k} {v:,}" for k, v in moved.get("hit_tokens", {}).items() if v) or "-",
                str(sum(moved.get("dropped_records", {}).values())),
            ]
        )
    return table(lines) + "".join(
        f"\n{name}: {seconds:.2f} s together" for name, seconds in totals(rows).items()
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw times until the first token over the prompt's length, or seconds of rounds by store;
    returns `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    first, served = _rows(result, "FirstToken"), _rows(result, "Row")
    for source in dict.fromkeys(row["source"] for row in first):
        points = [
            (row["input_len"], min(row["seconds"])) for row in first if row["source"] == source
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=source)
    for store in dict.fromkeys(row["store"] for row in served):
        points = [(row["round"], row["seconds"]) for row in served if row["store"] == store]
        axes.plot(*zip(*points, strict=True), marker="o", label=store)
    if first:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set_xlabel("tokens of the prompt" if first else "round")
    axes.set_ylabel("seconds until the first token" if first else "seconds")
    axes.set_title(f"{result['sizes']['model']}, {result['environment']['machine']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
