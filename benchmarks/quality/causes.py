"""Why facts get lost: by which side, which band and which scales of a page.

Variants of one format, judged by divergence and by needles of kind `code`, which differ from their
neighbours only in a name. No variant has more bytes than the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from spectral_paged.benchmarks.quality.experiments import Experiment
from spectral_paged.benchmarks.quality.formats import MethodSet
from spectral_paged.benchmarks.quality.journal import Journal
from spectral_paged.benchmarks.quality.judge import (
    Progress,
    judge_continuation,
    judge_probes,
)
from spectral_paged.benchmarks.quality.methods import Method
from spectral_paged.benchmarks.quality.page_methods import SpectralMethod
from spectral_paged.benchmarks.quality.replay import Replay
from spectral_paged.benchmarks.quality.sources import sources_digest
from spectral_paged.benchmarks.quality.tasks import Haystack, Window, needle_probes
from spectral_paged.errors import FormatError
from spectral_paged.kernels.math.rotary import read_keys, rotate, stored_keys
from spectral_paged.kernels.page.view import side_view
from spectral_paged.pages import decode_pages, encode_pages

NEEDLES = ("code",)  # styles of the needles here
FAMILY = "code"  # of their probes, which are no part of the tables of all needles
ScaleRule = Literal["unbiased", "norm"]


@cache
def causes_digest() -> str:
    """The digest of this module, in the keys of its methods."""
    return sources_digest((__name__,))


@dataclass(frozen=True)
class Damaged(SpectralMethod):
    """Pages of a format that calibrates its basis, with a hand on what is stored or read."""

    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.format.name}, {self.label}"

    @property
    def fingerprint(self) -> str:
        return f"{self.label}/{super().fingerprint}/{causes_digest()}"

    def rebuild_layers(
        self, layers: Sequence[int], k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rebuild blocks of many layers; see `ManyLayers`."""
        keys = stored_keys(rotate(k, cos, sin), cos, sin, self.format.rope)
        given = {"k": keys, "v": v}
        pages = encode_pages(keys, v, self.format, basis=self.basis, layers=layers)
        self.change(pages, given, layers)
        read = decode_pages(pages, self.format, basis=self.basis, layers=layers)
        new_k, new_v = (self.seen(s, given[s], x, layers) for s, x in zip("kv", read, strict=True))
        return read_keys(new_k, cos, sin, self.format.rope), new_v

    def change(self, pages: Tensor, given: dict[str, Tensor], layers: Sequence[int]) -> None:
        """Change encoded pages of the K and V `given`, in place."""

    def seen(self, side: str, given: Tensor, read: Tensor, layers: Sequence[int]) -> Tensor:
        """The K or V that attention sees, of those given and those read from pages."""
        return read

    def projection(self, side: str, layers: Sequence[int]) -> Tensor:
        """The matrices from tokens less their mean to coefficients, `[N, H, D, rank]`."""
        assert self.basis is not None
        return self.basis.projections(layers)[f"{side}_projection"]


@dataclass(frozen=True)
class OnePart(Damaged):
    """The errors of one side only, or of one of its bands; all else is exact.

    `band` -1 is the error outside the basis.
    """

    side: str = "k"
    band: int | None = None

    def seen(self, side: str, given: Tensor, read: Tensor, layers: Sequence[int]) -> Tensor:
        if side != self.side:
            return given
        if self.band is None:
            return read
        assert self.basis is not None
        bands = self.format.k_bands if side == "k" else self.format.v_bands
        counts = [count for count, _ in bands]
        span = slice(sum(counts[: self.band]), sum(counts[: self.band + 1]))
        if self.band < 0:
            span = slice(0, sum(counts))
        index = torch.tensor(list(layers), device=given.device)
        rows = self.basis.side(side).rows[index][..., span, :]
        error = read - given
        inside = (error @ self.projection(side, layers)[..., span]) @ rows
        return given + (error - inside if self.band < 0 else inside)


@dataclass(frozen=True)
class Rescaled(Damaged):
    """Pages whose scales are not those of least squares, which shrink what they store.

    `unbiased` scales leave the mean product with the stored vector as it was, `norm` ones its
    length. `band` None means all bands of `sides`.
    """

    rule: ScaleRule = "unbiased"
    sides: str = "k"
    band: int | None = None

    def change(self, pages: Tensor, given: dict[str, Tensor], layers: Sequence[int]) -> None:
        for side in self.sides:
            view = side_view(pages, self.format.layout, side)
            if view.mean is None or view.gain is None:
                raise FormatError(f"{self.format.name} has no mean or no gain to rescale with")
            x = (given[side] - view.mean.float().unsqueeze(-2)) @ self.projection(side, layers)
            kept = (view.gain != 0).unsqueeze(-1)  # codes of tokens in slots mean nothing
            groups = (view.layout.scale_groups, -1)
            x, stored = (
                (y * kept).unflatten(-2, groups) for y in (x, view.coefficients())
            )  # [N, H, groups, tokens, rank]
            own, both, other = (
                (a * b).sum(dim=-2) for a, b in ((x, x), (x, stored), (stored, stored))
            )
            factor = own / both if self.rule == "unbiased" else (own / other).sqrt()
            factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
            if self.band is not None:
                band = view.layout.bands[self.band]
                chosen = torch.zeros(factor.shape[-1], dtype=torch.bool, device=factor.device)
                chosen[band.first : band.first + band.count] = True
                factor = torch.where(chosen, factor, 1.0)
            view.scale.copy_((view.scale.float() * factor).bfloat16())


def calibrated_pages(methods: MethodSet) -> list[SpectralMethod]:
    """The judged formats with a shared basis.

    Raises:
        FormatError: there is none.
    """
    found = [
        m
        for m in methods.ours
        if isinstance(m, SpectralMethod) and m.basis is not None and m.format.basis == "shared"
    ]
    if not found:
        raise FormatError(
            "sections sides and scales vary formats with a calibrated basis: judge "
            "spectral-quality or spectral-compact"
        )
    return found


def sides(methods: MethodSet) -> list[Experiment]:
    """The experiments that let only a side, or a band of it, have errors."""
    found = []
    for base in calibrated_pages(methods):
        rows: list[Damaged] = []
        for side, bands in (("k", base.format.k_bands), ("v", base.format.v_bands)):
            whole = OnePart(base.format, base.basis, label=f"{side.upper()} alone", side=side)
            rows.append(whole)
            parts = {i: f"{n} x {bits} bits" for i, (n, bits) in enumerate(bands)}
            if (left := base.format.head_dim - sum(n for n, _ in bands)) > 0:
                parts[-1] = f"{left} left out"
            for band, what in parts.items() if len(parts) > 1 else ():
                label = f"{side.upper()} {what} alone"
                rows.append(replace(whole, label=label, band=band))
        found.append(_experiment(methods, base, rows, "What errs", "errors of one part only"))
    return found


def scales(methods: MethodSet) -> list[Experiment]:
    """The experiments with scales that are unbiased, or keep the norm, by side and by band."""
    found = []
    for base in calibrated_pages(methods):
        bands = {"k": base.format.k_bands, "v": base.format.v_bands}
        rows: list[Damaged] = []
        rules: tuple[ScaleRule, ...] = ("unbiased", "norm")
        for rule in rules:
            for side in ("k", "v", "kv"):
                label = f"{rule} {' and '.join(side.upper())}"
                rows.append(Rescaled(base.format, base.basis, "spectral", label, rule, side))
            for side, of_side in bands.items():
                for i, (count, bits) in enumerate(of_side) if len(of_side) > 1 else ():
                    label = f"{rule} {side.upper()} {count} x {bits} bits"
                    rows.append(Rescaled(base.format, base.basis, "spectral", label, rule, side, i))
        text = "scales that are unbiased or keep the norm, instead of least squares"
        found.append(_experiment(methods, base, rows, "Scales", text))
    return found


def _experiment(
    methods: MethodSet, base: SpectralMethod, rows: Sequence[Damaged], title: str, text: str
) -> Experiment:
    methods.formats |= {row.name: asdict(row.format) for row in rows}
    return Experiment(f"{title}: {base.name}", f"{base.name} with {text}.", (base, *rows))


CAUSES: dict[str, Callable[[MethodSet], list[Experiment]]] = {"sides": sides, "scales": scales}


def judge_causes(
    replay: Replay,
    methods: Sequence[Method],
    windows: Sequence[Window],
    hay: Haystack,
    length: int,
    *,
    journal: Journal,
    target: int,
    progress: Progress = print,
) -> None:
    """Judge methods at one length: divergence, then needles until exact has recalled `target`."""
    judge_continuation(replay, methods, windows, journal=journal, progress=progress)
    judge_probes(
        replay,
        methods,
        lambda round: needle_probes(hay, [length], round, styles=NEEDLES, family=FAMILY),
        journal=journal,
        tokenizer=hay.tokenizer,
        target=target,
        max_rounds=24,
        progress=progress,
    )
