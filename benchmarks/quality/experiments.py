"""Experiments: groups of format variants, judged side by side on the same windows of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spectral_paged.benchmarks.quality.formats import REFERENCE, MethodSet, rank_grid, unique
from spectral_paged.benchmarks.quality.journal import Journal
from spectral_paged.benchmarks.quality.judge import Progress, judge_window
from spectral_paged.benchmarks.quality.methods import HOT, LANDMARKS, Method
from spectral_paged.benchmarks.quality.replay import Replay
from spectral_paged.benchmarks.quality.summary import REFITTED
from spectral_paged.benchmarks.quality.tasks import Haystack, Window
from spectral_paged.pages import PageFormat

NOTHING: dict[str, Any] = {  # a page of codes and basis alone, sealed from the first token on
    "mean": False,
    "gain": False,
    "outlier_slots": 0,
    "num_landmark_tokens": 0,
    "dim_weighting": "none",
}


@dataclass(frozen=True, slots=True)
class Experiment:
    """A group of methods that the report compares in one table."""

    title: str
    text: str
    methods: tuple[Method, ...]

    def described(self, length: int) -> dict[str, Any]:
        """The group in the form that `summary.aggregate` takes."""
        names = [m.name for m in self.methods]
        return {"title": self.title, "text": self.text, "methods": names, "length": length}


def present(*methods: Method | None) -> tuple[Method, ...]:
    """The methods that are not None, one a name."""
    return tuple(unique(m for m in methods if m is not None))


def ranks(methods: MethodSet) -> Experiment:
    """The experiment of INT8 pages with their own basis at several ranks."""
    reference = methods.preset(REFERENCE)
    rows: list[Method | None] = []
    for k_rank, v_rank in rank_grid(reference.head_dim):
        format = replace(
            reference,
            name=f"int8 {k_rank}/{v_rank}",
            k_bands=((k_rank, 8),),
            v_bands=((v_rank, 8),),
            basis="page",
            dim_weighting="none",
        )
        rows.append(methods.method(format))
        rows.append(methods.variant(format, f"{format.name}, nothing else", **NOTHING))
    return Experiment(
        "Ranks",
        "INT8 coefficients on a basis in every page, at K and V ranks 16/32, 32/64 "
        "and 64/128 of a head of 128 (narrower heads in proportion): with page mean and 64 exact "
        "landmarks, and with nothing else.",
        present(*rows),
    )


def reference(methods: MethodSet) -> Experiment:
    """The experiment that varies landmarks, mean and weighting of the reference format."""
    format = methods.preset(REFERENCE)
    name = format.name
    return Experiment(
        f"What surrounds the ranks of {name}",
        "The same ranks without landmarks, without page mean, without weighting, and without any "
        "of them.",
        present(
            methods.method(format),
            methods.variant(format, f"{name}, no landmarks", num_landmark_tokens=0),
            methods.variant(format, f"{name}, no mean", mean=False),
            methods.variant(format, f"{name}, no weighting", dim_weighting="none"),
            methods.variant(format, f"{name}, calibrated weighting", dim_weighting="calibrated"),
            methods.variant(format, f"{name}, nothing else", **NOTHING),
        ),
    )


def has_low_bands(format: PageFormat) -> bool:
    """True if some components have fewer than 8 bits."""
    return any(bits < 8 for _, bits in format.k_bands + format.v_bands)


def ablation(methods: MethodSet) -> Experiment:
    """The experiment that changes one feature of the base preset at a time."""
    base = methods.base()

    def changed(what: str, **changes: Any) -> Method | None:
        return methods.variant(base, f"{base.name}, {what}", **changes)

    sign = "no " if base.gain else ""
    rotated = "no band rotation" if base.band_rotation else "band rotation"
    turned = {"pre": "before RoPE", "frame": "turned by frame", "post": "after RoPE"}
    rows = [
        methods.method(base),
        changed("no mean", mean=False),
        changed(f"{sign}gain", gain=not base.gain),
        changed("64-token scales, no gain", gain=False, scale_tokens=64),
        *(changed(f"{n} outlier slots", outlier_slots=n) for n in (0, 2, 4, 8)),
        *(changed(f"weighting {w}", dim_weighting=w) for w in ("none", "diagonal", "calibrated")),
        *(changed(what, rope=rope) for rope, what in turned.items() if rope != base.rope),
    ]
    if has_low_bands(base):  # bands of 8 bits have neither levels nor a rotation
        rows.append(changed(rotated, band_rotation=not base.band_rotation))
        rows.append(changed("uniform levels", levels="uniform"))
    return Experiment(
        f"Ablation of {base.name}",
        "One feature changed at a time, all else as in the first row. A change that costs or saves "
        "bytes shows it in the ratio.",
        present(*rows),
    )


def basis(methods: MethodSet) -> Experiment:
    """The experiment of the base preset with bases of the page, of a calibration and online."""
    base = methods.base()
    name, page = base.name, {"basis": "page", "basis_bits": 8}
    shared, plain = {"basis": "shared"}, {"dim_weighting": "none"}
    low = {**page, "basis_bits": 4}
    narrow = methods.variant(base, f"{name}, page basis INT4", **low)
    return Experiment(
        "Where the basis comes from",
        f"{name} with a basis in every page (rows in INT8, or INT4 below 8 bits), shared from the "
        "calibration text, and accumulated online from the context's first sealed block, which has "
        "no weights to use.",
        present(
            methods.method(base),
            methods.variant(base, f"{name}, page basis", **page),
            narrow if has_low_bands(base) else None,
            methods.variant(base, f"{name}, page basis, unweighted", **{**page, **plain}),
            methods.variant(
                base, f"{name}, shared, weighted", **shared, dim_weighting="calibrated"
            ),
            methods.variant(base, f"{name}, shared, unweighted", **{**shared, **plain}),
            methods.online(base, f"{name}, online"),
        ),
    )


def weighting_pair(methods: MethodSet) -> tuple[Method, ...]:
    """The reference ranks on a page basis, with tokens weighed alike and by attention mass."""
    page = replace(methods.preset(REFERENCE), basis="page")
    return present(
        methods.method(page),
        methods.weighted(page, f"{page.name}, attention mass"),
    )


def weighting(methods: MethodSet) -> Experiment:
    """The experiment of a page basis with tokens weighed by attention mass, or alike."""
    base = methods.base()
    name = base.name if base.basis == "page" else f"{base.name}, page basis"
    page = replace(base, name=name, basis="page")
    attention = methods.weighted(page, f"{name}, attention mass")
    rows = [*weighting_pair(methods), methods.method(page), attention]
    return Experiment(
        "Tokens weighed by attention",
        "A page's own basis from all tokens alike, and from tokens weighed by the attention mass "
        "of the block's last 64 queries.",
        present(*rows),
    )


def _numbers(methods: MethodSet, format: PageFormat, field: str, what: str) -> tuple[Method, ...]:
    return present(
        methods.method(format),
        *(
            methods.variant(format, f"{format.name}, {what} {n}", **{field: n})
            for n in (0, 64, 128)
        ),
    )


def landmarks(methods: MethodSet) -> Experiment:
    """The experiment of how many of the first tokens stay exact."""
    return Experiment(
        "Landmarks",
        "The first 0, 64 or 128 tokens kept exact; the same blocks before the same continuation.",
        _numbers(methods, methods.base(), "num_landmark_tokens", "landmarks"),
    )


def hot(methods: MethodSet) -> Experiment:
    """The experiment of how many of the newest tokens stay exact."""
    return Experiment(
        "Hot window",
        "The newest 0, 64 or 128 tokens kept exact, at the moment a block has just been sealed "
        "before them: the worst one. The same number of blocks before the same continuation.",
        _numbers(methods, methods.base(), "hot_tokens", "hot"),
    )


EXPERIMENTS: dict[str, Callable[[MethodSet], Experiment]] = {
    "ablation": ablation,
    "basis": basis,
    "reference": reference,
    "ranks": ranks,
    "landmarks": landmarks,
    "hot": hot,
    "weighting": weighting,
}


def refitted(hay: Haystack, window: Window, landmarks: int, hot: int) -> Window:
    """The same continuation behind as many blocks, with other numbers of exact tokens.

    A context of `continuation_windows` has 64 landmarks and 64 hot tokens. This one begins earlier
    or later, so that exactly `hot` tokens follow the last block whatever the landmarks.
    """
    more = landmarks + hot - LANDMARKS - HOT
    if not more:
        return window
    start = window.start - more
    body = len(window.context) - len(hay.prefix) + more
    context = (*hay.prefix, *hay.ids(window.genre)[start : start + body])
    return replace(window, start=start, context=context)


def judge_experiments(
    replay: Replay,
    experiments: Sequence[Experiment],
    windows: Sequence[Window],
    hay: Haystack,
    *,
    journal: Journal,
    progress: Progress = print,
) -> None:
    """Judge every method of every experiment on every window; results go to the journal."""
    groups: dict[tuple[int, int], list[Method]] = {}
    for method in unique(m for e in experiments for m in e.methods):
        groups.setdefault((method.num_landmark_tokens, method.hot_tokens), []).append(method)
    for i, window in enumerate(windows):
        for (first, last), methods in groups.items():
            fitted = refitted(hay, window, first, last)
            task = "continuation" if fitted == window else REFITTED
            judge_window(replay, methods, fitted, journal, task=task)
            progress(
                f"experiments, window {i + 1}/{len(windows)}: {window.genre} {window.length}, "
                f"{len(methods)} formats with {first} landmarks and {last} hot tokens"
            )
