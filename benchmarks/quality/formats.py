"""The page formats of a run: presets by name, and variants of them, bound to a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from spectral_paged.benchmarks.quality.methods import Exact, Method, hadamard
from spectral_paged.benchmarks.quality.page_methods import (
    OnlineMethod,
    SpectralMethod,
    WeightedMethod,
)
from spectral_paged.benchmarks.quality.peers import peer_methods
from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.models.calibration import find_calibration
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import PRESETS, BoundBasis, PageFormat, SharedBasis

BASE = "spectral-quality"  # the preset whose variants most experiments judge, where it exists
REFERENCE = "spectral-int8"


def rank_grid(head_dim: int) -> list[tuple[int, int]]:
    """K and V ranks 16/32, 32/64 and 64/128 of a head of 128, in proportion, in steps of 16."""

    def scaled(rank: int) -> int:
        return min(head_dim, max(16, rank * head_dim // 128 // 16 * 16))

    pairs = [(scaled(k), scaled(v)) for k, v in ((16, 32), (32, 64), (64, 128))]
    return list(dict.fromkeys(pairs))


def unique(methods: Iterable[Method]) -> list[Method]:
    """One method a name, in order of first appearance."""
    found: dict[str, Method] = {}
    for method in methods:
        found.setdefault(method.name, method)
    return list(found.values())


def parsed_bands(text: str) -> tuple[tuple[int, int], ...]:
    """Bands written as `16x8+48x2`: 16 components of 8 bits, then 48 of 2."""
    pairs = (band.split("x") for band in text.split("+"))
    return tuple((int(count), int(bits)) for count, bits in pairs)


def parsed_variant(text: str) -> tuple[str, dict[str, Any]]:
    """The preset and the changed fields of a variant like `spectral-quality k=64x4 rope=pre`.

    `k` and `v` are the bands of a side, and all other names are fields of `PageFormat`.

    Raises:
        InvalidRequestError: a part is written otherwise, or is no field.
    """
    preset, *parts = text.split()
    known = {f.name: f for f in fields(PageFormat)}
    changes: dict[str, Any] = {}
    for part in parts:
        name, given, value = part.partition("=")
        try:
            if name in ("k", "v"):
                changes[f"{name}_bands"] = parsed_bands(value)
            elif not given or name not in known:
                raise ValueError
            elif value in ("true", "false"):
                changes[name] = value == "true"
            else:
                changes[name] = int(value) if value.isdigit() else value
        except ValueError as error:
            raise InvalidRequestError(
                f"--variant {shown(text)}: {shown(part)} is neither bands, as k=16x8+48x2, nor a "
                f"field of PageFormat with its value; fields are {', '.join(known)}"
            ) from error
    return preset, changes


def hadamard_page(format: PageFormat, num_layers: int, device: torch.device) -> SpectralMethod:
    """Pages of `format`, byte for byte as many, whose basis knows nothing: Hadamard's matrix.

    It has no metric either. What the preset does better than this row is its basis's.
    """
    heads, dim = format.num_kv_heads, format.head_dim
    rows = hadamard(torch.eye(dim))
    strength = torch.arange(dim, 0, -1.0)  # an order of its rows
    moment, plain = (
        x.expand(num_layers, heads, dim, dim).contiguous()
        for x in ((rows.mT * strength) @ rows, torch.eye(dim))
    )
    names = ("k_pre", "k_frame", "k_post", "v")
    basis = SharedBasis(
        **dict.fromkeys(names, moment),
        **dict.fromkeys(("q_pre", "q_post", "o"), plain),
        model_fingerprint="hadamard",
        num_tokens=0,
    )
    changes: dict[str, Any] = {"dim_weighting": "none", "band_rotation": False, "basis_id": ""}
    bound = basis.bind(replace(format, name=f"{format.name}-hadamard", **changes), device)
    return SpectralMethod(bound.format, bound, family="rotated")


class MethodSet:
    """The formats and peers of a run, as methods of one model.

    Args:
        names: presets to judge; empty for all.
        variants: more formats, each a preset and its changed fields; see `parsed_variant`.
        calibration: `auto` for the model's calibration on the built-in text, or a file.
        peers: judge the peers too.

    Attributes:
        ours, peers: the methods of the main tables.
        formats: fields of every format that became a method, by name, for the result file.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        names: Sequence[str] = (),
        *,
        variants: Sequence[str] = (),
        calibration: str = "auto",
        peers: bool = True,
    ) -> None:
        self._loaded, self._given = loaded, calibration
        self._basis: SharedBasis | None = None
        self.formats: dict[str, dict[str, Any]] = {}
        wanted = names or [p for p in PRESETS if p != "exact"]
        self.ours = unique([*map(self.preset_method, wanted), *map(self.variant_method, variants)])
        self.peers = [*peer_methods(), *self._hadamard_pages()] if peers else []

    def _hadamard_pages(self) -> list[Method]:
        """The base preset on Hadamard's matrix, if it is judged and keeps all components."""
        judged = [m.format for m in self.ours if isinstance(m, SpectralMethod) and m.name == BASE]
        geometry = self._loaded.geometry
        width = geometry.head_dim
        pages = [
            hadamard_page(format, geometry.num_layers, self._loaded.model.device)
            for format in judged
            if format.k_rank == format.v_rank == width and not width & (width - 1)
        ]
        self.formats |= {page.name: asdict(page.format) for page in pages}
        return list[Method](pages)

    @property
    def main(self) -> list[Method]:
        return [*self.ours, *self.peers]

    @property
    def basis(self) -> SharedBasis | None:
        """The calibration, or None if no format has needed one so far."""
        return self._basis

    def base(self) -> PageFormat:
        """The preset whose variants experiments judge."""
        return self.preset(BASE if BASE in PRESETS else PRESETS[-1])

    def preset(self, name: str) -> PageFormat:
        geometry = self._loaded.geometry
        return PageFormat.preset(
            name, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim
        )

    def preset_method(self, name: str) -> Method:
        """The preset `name` as a method; raises FormatError for an unknown name."""
        return self.method(self.preset(name))

    def variant_method(self, text: str) -> Method:
        """The variant that `text` describes as a method of that name; see `parsed_variant`."""
        preset, changes = parsed_variant(text)
        return self.method(replace(self.preset(preset), name=text, **changes))

    def method(self, format: PageFormat) -> Method:
        """`format` as a method, bound to the calibration if it needs one."""
        if not format.seals:
            return Exact()
        format, bound = self._bound(format)
        self.formats[format.name] = asdict(format)
        return SpectralMethod(format, bound)

    def weighted(self, format: PageFormat, name: str) -> Method:
        """`format` under `name`, with tokens weighed by the attention of their block's queries."""
        format, bound = self._bound(replace(format, name=name))
        self.formats[name] = {**asdict(format), "token_weighting": "attention"}
        return WeightedMethod(format, bound)

    def _bound(self, format: PageFormat) -> tuple[PageFormat, BoundBasis | None]:
        bound = None
        if format.needs_calibration:
            if self._basis is None:
                basis = find_calibration(self._given, format, self._loaded)
                if not isinstance(basis, SharedBasis):
                    raise InvalidRequestError(
                        f"calibration={self._given!r} gives no basis to judge before a context is "
                        "read: use auto or a file; the section `basis` judges online ones"
                    )
                self._basis = basis
            bound = self._basis.bind(format, self._loaded.model.device)
            format = bound.format
        return format, bound

    def variant(self, format: PageFormat, name: str, **changes: Any) -> Method | None:
        """`format` with `changes`, under `name`; None if they change nothing."""
        changed = replace(format, name=name, **changes)
        return None if changed.fingerprint == format.fingerprint else self.method(changed)

    def online(self, format: PageFormat, name: str) -> Method:
        """`format` under `name`, with a basis learnt from the first sealed block."""
        changed = replace(format, name=name, basis="shared", dim_weighting="none")
        self.formats[name] = {**asdict(changed), "calibration": "online"}
        return OnlineMethod(changed)
