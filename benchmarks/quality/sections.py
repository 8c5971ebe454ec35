"""The sections of a report, each built from a results value if its data exist.

A section is a title, a paragraph, a table and perhaps a picture. To add one, write a function
from results to `Section | None` and name it in `SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spectral_paged.benchmarks.quality import plots
from spectral_paged.benchmarks.quality.layer_sections import (
    attention_heads,
    needle_tokens,
    reconstruction,
    sensitivity,
    spectra,
)
from spectral_paged.benchmarks.quality.methods import HOT
from spectral_paged.benchmarks.quality.tables import (
    KL_DIGITS,
    Results,
    Section,
    by_ratio,
    cell,
    number,
    points,
    share,
    times,
)
from spectral_paged.kernels.page.layout import BLOCK_TOKENS

STORAGE_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def continuation_rows(methods: Sequence[tuple[str, Any]], genres: Sequence[str]) -> list[list[str]]:
    rows = []
    for name, m in methods:
        spread = m["kl_standard_error"]
        kl = number(m["kl"], KL_DIGITS)
        kl += f" ± {spread:.{KL_DIGITS}f}" if spread is not None else ""
        rows.append(
            [name, times(m["ratio"]), f"{m['bytes_per_token']:.1f}", kl, number(m["kl_p99"], 3)]
            + [cell(m["kl_by_genre"].get(g)) for g in genres]
            + [f"{100 * m['top1']:.1f} %", number(m["perplexity_ratio"])]
            + [f"{m['tokens']} in {m['windows']}"]
        )
    return rows


def genres_of(methods: Mapping[str, Any]) -> list[str]:
    return sorted({g for m in methods.values() for g in m["kl_by_genre"]})


KL_HEAD = ["method", "ratio", "B/token/head", "KL mean", "KL p99"]


def divergence(results: Results) -> Section | None:
    if not (summary := results.get("overall")) or not summary["methods"]:
        return None
    genres, exact = genres_of(summary["methods"]), summary["exact"]
    return Section(
        "Divergence from the exact cache",
        f"KL(exact || method) in nats a token over {exact['tokens']} teacher-forced tokens of real "
        f"text in {exact['windows']} windows; the error is that of the mean over windows. Ratio is "
        "of sealed tokens against 2 bytes an element. Perplexity of the exact cache is "
        f"{exact['perplexity']:.3f}; the ratio to it can fall below 1 by chance. The row `exact`, "
        "where there is one, is the noise of the replay itself.",
        [*KL_HEAD, *genres, "top-1", "ppl ratio", "tokens"],
        continuation_rows(by_ratio(summary["methods"]), genres),
        lambda path: plots.pareto(summary["methods"], path),
    )


def comparisons(results: Results) -> list[Section]:
    """A section for each experiment: ranks, ablation, hot tokens and others."""
    sections = []
    for group in results.get("comparisons") or []:
        if chosen := group["summary"]:
            genres = genres_of(chosen)
            columns = [*KL_HEAD, *genres, "top-1", "ppl ratio", "tokens"]
            rows = continuation_rows(list(chosen.items()), genres)
            if recall := group.get("recall"):
                columns.append("code needles")
                rows = [[*row, share(recall.get(row[0]))] for row in rows]
            sections.append(Section(group["title"], group["text"], columns, rows))
    return sections


def progressive(results: Results) -> Section | None:
    cells = [c for c in results.get("continuation") or [] if c["segment"] is None]
    if len(cells) < 2:
        return None
    names = [n for n, _ in by_ratio(results["methods"])]
    table = {n: [c["methods"].get(n, {}).get("kl") for c in cells] for n in names}
    rows = [
        [n, times(results["methods"][n]["ratio"]), *map(cell, table[n])]
        for n in names
        if any(x is not None for x in table[n])
    ]
    lengths = [c["length"] for c in cells]
    return Section(
        "Longer contexts",
        "Mean KL by length of the context, prefilled exactly and then sealed.",
        ["method", "ratio", *map(str, lengths)],
        rows,
        lambda path: plots.lines(table, lengths, "context tokens", "KL mean (nats)", path),
    )


def segments(results: Results) -> Section | None:
    cells = [c for c in results.get("continuation") or [] if c["segment"]]
    if not cells:
        return None
    keys = sorted({c["segment"] for c in cells})
    rows = []
    for length in sorted({c["length"] for c in cells}):
        here = {c["segment"]: c["methods"] for c in cells if c["length"] == length}
        base = {n: m for c in cells if c["length"] == length for n, m in c["exact_prefill"].items()}
        for name, m in by_ratio({n: m for c in here.values() for n, m in c.items()}):
            kls = [here.get(s, {}).get(name, {}).get("kl") for s in keys]
            rows.append(
                [name, times(m["ratio"]), str(length)]
                + [*map(cell, kls), cell(base.get(name, {}).get("kl"))]
            )
    return Section(
        "Prefill over pages",
        "Mean KL where later context is itself computed over sealed pages, by `prefill_segment`; "
        "the last column prefills the whole context of the same windows exactly.",
        ["method", "ratio", "context", *(f"S = {s}" for s in keys), "exact prefill"],
        rows,
    )


def needles(results: Results) -> Section | None:
    if not (summary := results.get("needles")):
        return None
    cells = [(p, n) for p, by in summary["exact"]["by_length"].items() for n in by]
    cells.sort(key=lambda c: (c[0], int(c[1])))
    rows = []
    for name, m in by_ratio(summary["methods"]):
        found = [share(m["by_length"].get(p, {}).get(n)) for p, n in cells]
        rows.append([name, times(m["ratio"]), share(m["total"]), *found, share(m["tail"])])
    base = [share(summary["exact"]["by_length"][p][n]) for p, n in cells]
    rows.append(["exact cache, of all asked", "-", share(summary["exact"]["total"]), *base, "-"])
    return Section(
        "Needles",
        "Facts hidden in real text; pages are sealed before the question is read. Recalled of "
        "asked; only what the exact cache recalls is asked. Facts outside of sealed blocks are "
        "counted apart (last column).",
        ["method", "ratio", "all", *(f"{p} at {n}" for p, n in cells), "not sealed"],
        rows,
        lambda path: plots.needle_maps(summary, path),
    )


def needle_details(results: Results) -> Section | None:
    if not (summary := results.get("needles")):
        return None
    depths: set[str] = set()
    kinds: set[str] = set()
    for found in [summary["exact"], *summary["methods"].values()]:
        depths |= {d for by in plots.added(found["by_depth"].values()).values() for d in by}
        kinds |= {k for by in found["by_kind"].values() for k in by}
    columns = [*sorted(depths, key=float), *sorted(kinds)]

    def cells(found: Mapping[str, Any]) -> list[str]:
        total = {c: [0, 0] for c in columns}
        by_depth = plots.added(found["by_depth"].values()).values()
        for group in [*by_depth, *found["by_kind"].values()]:
            for key, (right, asked) in group.items():
                total[key] = [total[key][0] + right, total[key][1] + asked]
        return [share(total[c]) for c in columns]

    rows = [[name, times(m["ratio"]), *cells(m)] for name, m in by_ratio(summary["methods"])]
    rows.append(["exact cache, of all asked", "-", *cells(summary["exact"])])
    return Section(
        "Needles by depth and kind",
        "The same, all lengths together: by depth of the fact in the sealed part, and by kind. "
        "`mixed` needles each have their own sentence; `code` and `passphrase` ones differ from "
        "their seven neighbours only in a name.",
        ["method", "ratio", *columns],
        rows,
    )


def tasks(results: Results) -> Section | None:
    if not (summary := results.get("tasks")):
        return None
    kinds = sorted(summary["exact"]["by_kind"].get("task", {}))
    rows = []
    for name, m in by_ratio(summary["methods"]):
        found = m["by_kind"].get("task", {})
        rows.append([name, times(m["ratio"]), share(m["total"])])
        rows[-1] += [share(found.get(k)) for k in kinds] + [share(m["tail"])]
    base = [share(summary["exact"]["by_kind"]["task"][k]) for k in kinds]
    rows.append(["exact cache, of all asked", "-", share(summary["exact"]["total"]), *base, "-"])
    return Section(
        "Tasks with exact answers",
        "Questions on facts at the beginning, middle and end; parameters of a function in a long "
        "source; intermediate results; a fact sheet asked as a summary. Right of asked, counted "
        "as for needles.",
        ["method", "ratio", "all", *kinds, "not sealed"],
        rows,
    )


def ruler(results: Results) -> list[Section]:
    """A section for each length of RULER's tasks."""
    if not (summary := results.get("ruler")):
        return []
    sections = []
    for length, exact in sorted(summary["exact"].items(), key=lambda item: int(item[0])):
        kinds = list(exact["kinds"])
        rows = []
        for name, m in by_ratio(summary["methods"]):
            if found := m["lengths"].get(length):
                scores = [found["mean"], *(found["kinds"].get(kind) for kind in kinds)]
                rows.append([name, times(m["ratio"]), *map(points, scores)])
        base = [exact["mean"], *(exact["kinds"][kind] for kind in kinds)]
        rows.append(["exact cache", "-", *map(points, base)])
        asked = sum(exact["asked"].values())
        sections.append(
            Section(
                f"RULER at {length} tokens",
                f"The {len(kinds)} kinds of RULER's tasks, made here, {asked} questions in all: "
                "shares of the answers that the generated text contains, in percent, and their "
                "mean. Pages are sealed before the question is read. All questions count, those "
                "that the exact cache fails too.",
                ["method", "ratio", "mean", *kinds],
                rows,
            )
        )
    return sections


def generation(results: Results) -> Section | None:
    if not (summary := results.get("generation")):
        return None
    rows = []
    exact = {"exact cache": {"ratio": None, "lengths": summary["exact"]}}
    for name, m in [*exact.items(), *by_ratio(summary["methods"])]:
        for length, g in sorted(m["lengths"].items(), key=lambda item: int(item[0])):
            rows.append(
                [name, times(m["ratio"]), length, f"{g['prefix']:.0f} of {g['tokens']:.0f}"]
                + [number(g["repetition"], 3), number(g["distinct2"], 3), number(g["distinct3"], 3)]
            )
    return Section(
        "Free generation",
        "Greedy tokens after prompts of real text, blocks sealed as they fall due: tokens before "
        "the first one that differs from the exact cache's, share of 4-grams said before, "
        "distinct-2 and distinct-3. A prompt under 640 tokens has no page until it grows.",
        ["method", "ratio", "prompt", "same tokens", "repetition", "distinct-2", "distinct-3"],
        rows,
    )


def storage(results: Results) -> Section | None:
    """Ratios of whole sequences by length, with exact landmarks and tail, by arithmetic only."""
    head_dim = results.get("head_dim")
    if not head_dim or not results["methods"]:
        return None
    rows = []
    for name, m in by_ratio(results["methods"]):
        ratios = []
        for n in STORAGE_LENGTHS:
            sealed = max(0, n - m["landmarks"] - HOT) // BLOCK_TOKENS * BLOCK_TOKENS
            size = sealed * m["bytes_per_token"] + (n - sealed) * 4 * head_dim
            ratios.append(f"{n * 4 * head_dim / size:.2f}x")
        rows.append([name, str(m["landmarks"]), times(m["ratio"]), *ratios])
    return Section(
        "Storage with landmarks and tail",
        "Ratio of the whole sequence against 2 bytes an element, exact landmarks, hot window and "
        "unfinished block counted at 2.",
        ["method", "landmarks", "sealed", *map(str, STORAGE_LENGTHS)],
        rows,
    )


SECTIONS: tuple[Callable[[Results], Section | None | list[Section]], ...] = (
    divergence,
    needles,
    needle_details,
    tasks,
    ruler,
    progressive,
    segments,
    comparisons,
    needle_tokens,
    reconstruction,
    attention_heads,
    spectra,
    sensitivity,
    storage,
    generation,
)
