"""Summaries of journal records as one results value: means, percentiles, counts; no torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spectral_paged.benchmarks.quality.journal import BASELINE, Record

SCHEMA = 1
ASIDE = ("sensitivity", "needle-tokens")  # tasks whose methods are not those of the main tables
REFITTED = "refitted"  # the task of windows cut for other numbers of landmarks or hot tokens


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values; tokens of one window are not."""
    if len(values) < 2:
        return None
    middle = sum(values) / len(values)
    spread = sum((v - middle) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(spread / len(values))


def unique(records: Iterable[Record]) -> list[Record]:
    return list({r["key"]: r for r in records}.values())


def by_method(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each method in order of first appearance, the baseline left out."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["method"] != BASELINE:
            groups[record["method"]].append(record)
    return dict(groups)


def described(record: Record) -> dict[str, Any]:
    """The fields of a record that describe its method."""
    return {k: record[k] for k in ("family", "landmarks", "bytes_per_token", "ratio")}


def continuation_summary(records: Iterable[Record]) -> dict[str, Any]:
    """Divergence, top-1 agreement and perplexity of every method.

    Divergence is KL(exact || method) in nats a token, with its p99 and its standard error over
    windows. Only windows that both the baseline and the method finished count. A method whose
    logits were not finite in some tokens has `kl` None and their number in `tokens_not_finite`.
    """
    records = unique(records)
    base = {r["unit"]: r["result"] for r in records if r["method"] == BASELINE}
    tokens = sum(r["tokens"] for r in base.values())
    nll = sum(r["nll"] for r in base.values())
    methods = {}
    for name, rows in by_method(records).items():
        rows = [r for r in rows if r["unit"] in base]
        if not rows:
            continue
        values = [x for r in rows for x in r["result"]["kl"]]
        finite = [x for x in values if x is not None]
        broken = len(values) - len(finite)
        genres: dict[str, list[float]] = defaultdict(list)
        windows = []
        for row in rows:
            genres[row["genre"]] += (good := [x for x in row["result"]["kl"] if x is not None])
            windows.append(mean(good) or 0.0)
        own = [r["result"]["nll"] for r in rows]
        own_nll = None if any(x is None for x in own) else sum(own) / len(values)
        exact_nll = sum(base[r["unit"]]["nll"] for r in rows) / len(values)
        methods[name] = {
            **described(rows[0]),
            "kl": mean(finite) if not broken else None,
            "kl_standard_error": standard_error(windows) if not broken else None,
            "kl_p99": percentile(finite, 0.99) if not broken else None,
            "kl_by_genre": {g: mean(v) for g, v in genres.items()} if not broken else {},
            "top1": sum(r["result"]["agree"] for r in rows) / len(values),
            "nll": own_nll,
            "perplexity": math.exp(min(own_nll, 700.0)) if own_nll is not None else None,
            "perplexity_ratio": (
                math.exp(min(own_nll - exact_nll, 700.0)) if own_nll is not None else None
            ),
            "tokens": len(values),
            "tokens_not_finite": broken,
            "windows": len(rows),
        }
    exact = {"tokens": tokens, "windows": len(base), "nll": nll / tokens if tokens else None}
    exact["perplexity"] = math.exp(nll / tokens) if tokens else None
    return {"exact": exact, "methods": methods}


def tally(answers: Iterable[bool]) -> list[int]:
    """The numbers of answers, `[right, asked]`."""
    answers = list(answers)
    return [sum(answers), len(answers)]


def grouped(answers: Sequence[Record], *keys: str) -> dict[str, Any]:
    """Tallies of answers by the values of `keys`, nested in their order."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for answer in answers:
        groups[str(answer[keys[0]])].append(answer)
    if len(keys) == 1:
        return {g: tally(a["correct"] for a in rows) for g, rows in groups.items()}
    return {g: grouped(rows, *keys[1:]) for g, rows in groups.items()}


def probe_summary(records: Iterable[Record]) -> dict[str, Any]:
    """Recall as `[right, asked]` by family of probes, length, depth and kind.

    Methods were asked only for facts that the exact cache recalled. Facts outside of sealed blocks
    count only in `tail`.
    """
    records = unique(records)

    def answers(rows: Iterable[Record]) -> list[Record]:
        return [
            {**a, "probe": r["probe"], "length": r["length"], "depth": round(a["depth"], 3)}
            for r in rows
            for a in r["result"]
        ]

    def tables(rows: list[Record]) -> dict[str, Any]:
        return {
            "total": tally(a["correct"] for a in rows),
            "by_length": grouped(rows, "probe", "length"),
            "by_depth": grouped(rows, "probe", "length", "depth"),
            "by_kind": grouped(rows, "probe", "kind"),
        }

    exact = answers(r for r in records if r["method"] == BASELINE)
    methods = {}
    for name, rows in by_method(records).items():
        all_answers = answers(rows)
        sealed = [a for a in all_answers if a["sealed"]]
        tail = tally(a["correct"] for a in all_answers if not a["sealed"])
        methods[name] = {
            **described(rows[0]),
            **tables(sealed),
            "tail": tail,
            "contexts": len(rows),
        }
    return {"exact": tables(exact), "methods": methods}


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct(ids: Sequence[int], n: int) -> float:
    """The share of different n-grams among all (distinct-n, Li et al., arXiv:1510.03055)."""
    grams = ngrams(ids, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def generation_summary(records: Iterable[Record]) -> dict[str, Any]:
    """Repetition and agreement of free generation by method and prompt length.

    These are the share of 4-grams seen before, distinct-2 and -3, and the number of tokens before
    the first that differs from the exact cache's."""
    records = unique(records)
    base = {r["unit"]: r["result"] for r in records if r["method"] == BASELINE}

    def table(rows: Sequence[Record]) -> dict[str, Any]:
        lengths: dict[str, list[Record]] = defaultdict(list)
        for row in rows:
            lengths[str(row["length"])].append(row)
        return {
            length: {
                "repetition": mean([1 - distinct(r["result"], 4) for r in group]),
                "distinct2": mean([distinct(r["result"], 2) for r in group]),
                "distinct3": mean([distinct(r["result"], 3) for r in group]),
                "prefix": mean([common_prefix(r["result"], base[r["unit"]]) for r in group]),
                "tokens": mean([len(r["result"]) for r in group]),
                "prompts": len(group),
            }
            for length, group in lengths.items()
        }

    methods = {
        name: {**described(rows[0]), "lengths": table(rows)}
        for name, rows in by_method(records).items()
    }
    exact = table([r for r in records if r["method"] == BASELINE])
    return {"exact": exact, "methods": methods}


def ruler_summary(records: Iterable[Record]) -> dict[str, Any]:
    """Mean scores of RULER's tasks by length and kind, exact and of every method.

    `mean` is that of the kinds, each counting alike. A score is a share of 1.
    """
    records = unique(records)

    def table(rows: Iterable[Record]) -> dict[str, Any]:
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            scores = [answer["score"] for answer in row["result"]]
            found[str(row["length"])][row["kind"]] += scores
        lengths = {}
        for length, kinds in found.items():
            means = {kind: mean(scores) or 0.0 for kind, scores in kinds.items()}
            asked = {kind: len(scores) for kind, scores in kinds.items()}
            lengths[length] = {"mean": mean(list(means.values())), "kinds": means, "asked": asked}
        return lengths

    methods = {
        name: {**described(rows[0]), "lengths": table(rows)}
        for name, rows in by_method(records).items()
    }
    return {"exact": table(r for r in records if r["method"] == BASELINE), "methods": methods}


def layer_table(records: Iterable[Record], task: str) -> dict[str, Any]:
    """Per-layer results of every method: reconstruction errors, or KL with one layer sealed."""
    return {
        name: {**described(rows[-1]), **rows[-1]["result"]}
        for name, rows in by_method(r for r in records if r["task"] == task).items()
    }


def sensitivity_table(records: Iterable[Record]) -> dict[str, Any]:
    """Mean KL with only layer i sealed, by method, layers in order."""
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        if r["task"] == "sensitivity" and r["method"] != BASELINE:
            name, _, layer = r["method"].rpartition("@")
            groups[name][int(layer)] += [x for x in r["result"]["kl"] if x is not None]
    return {
        name: {"layers": [mean(layers[i]) for i in sorted(layers)]}
        for name, layers in groups.items()
    }


def continuation_cells(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """Summaries of windows by segment and length.

    Those of a segment also have `exact_prefill`: the methods on the same windows after an exact
    prefill."""
    groups: dict[tuple[int, int], list[Record]] = defaultdict(list)
    for row in rows:
        groups[row["segment"] or 0, row["length"]].append(row)
    cells = []
    for (segment, length), group in sorted(groups.items()):
        cell = {"segment": segment or None, "length": length, **continuation_summary(group)}
        if segment:
            here = {r["window"] for r in group}
            same = (r for r in groups.get((0, length), []) if r["window"] in here)
            cell["exact_prefill"] = continuation_summary(same)["methods"]
        cells.append(cell)
    return cells


def compared(records: Sequence[Record], group: Mapping[str, Any]) -> dict[str, Any]:
    """`group` with a summary of its methods, in their order, over the windows of its length.

    `recall` has needles of kind `code` in sealed blocks, right of asked, where they were judged.
    """
    wanted = [BASELINE, *group["methods"]]
    summary = continuation_summary(
        r
        for r in records
        if r["task"] in ("continuation", REFITTED)
        and r["segment"] is None
        and r["method"] in wanted
        and group.get("length") in (None, r["length"])
    )["methods"]
    found = {**group, "summary": {n: summary[n] for n in group["methods"] if n in summary}}
    recall: dict[str, list[bool]] = defaultdict(list)
    for r in records:
        is_code = r["task"] == "probe" and r["probe"].startswith("code-")
        if is_code and r["method"] in wanted and group.get("length") in (None, r["length"]):
            recall[r["method"]] += [a["correct"] for a in r["result"] if a["sealed"]]
    if recall:
        found["recall"] = {n: tally(recall[n]) for n in group["methods"] if n in recall}
    return found


def aggregate(
    records: Iterable[Record],
    *,
    main: Sequence[str] | None = None,
    comparisons: Sequence[Mapping[str, Any]] = (),
    **head: Any,
) -> dict[str, Any]:
    """The results value of all records of one model.

    Args:
        main: methods of the main tables; None for all.
        comparisons: groups `{title, text, methods, length}`, each for a table of its own.
        head: environment, texts, notes and geometry, placed before the rest.
    """
    records = unique(records)
    compare = [compared(records, group) for group in comparisons]
    if main is not None:
        kept = {BASELINE, *main}
        records = [r for r in records if r["method"] in kept or r["task"] in ASIDE]
    tasks: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        tasks[record["task"]].append(record)
    results: dict[str, Any] = {"schema": SCHEMA, **head, "comparisons": compare, "methods": {}}
    for record in records:
        if record["method"] != BASELINE and record["task"] not in ASIDE:
            results["methods"].setdefault(record["method"], described(record))
    if rows := tasks["continuation"]:
        results["continuation"] = continuation_cells(rows)
        results["overall"] = continuation_summary(r for r in rows if r["segment"] is None)
    probes = tasks["probe"]
    if needles := [r for r in probes if r["probe"].startswith("needle")]:
        results["needles"] = probe_summary(needles)
    if others := [r for r in probes if r["probe"] == "task"]:
        results["tasks"] = probe_summary(others)
    if rows := tasks["ruler"]:
        results["ruler"] = ruler_summary(rows)
    if rows := tasks["generation"]:
        results["generation"] = generation_summary(rows)
    if tasks["reconstruction"]:
        results["reconstruction"] = layer_table(records, "reconstruction")
    if rows := tasks["spectra"]:
        results["spectra"] = rows[-1]["result"]
    if tasks["needle-tokens"]:
        results["needle_tokens"] = layer_table(records, "needle-tokens")
    if tasks["sensitivity"]:
        results["sensitivity"] = sensitivity_table(records)
    return results
