"""A cache's calibration is given, or taken online from the first blocks that the cache seals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spectral_paged.errors import FormatError
from spectral_paged.kernels.decode.batch import Basis
from spectral_paged.pages import BasisAccumulator, BoundBasis, PageFormat, SharedBasis


def check_calibration(
    calibration: SharedBasis | str | Path | None, format: PageFormat, num_layers: int
) -> None:
    """Refuse what is no calibration for `format`, if it needs one.

    Raises:
        FormatError: as in `bind`.
    """
    if not format.needs_calibration:
        return
    if calibration == "online":
        if format.dim_weighting != "none" or format.basis_id:
            raise FormatError(
                f"format {format.name!r} needs the weights of a real calibration; online there is "
                "only a basis: use dim_weighting='none' and no basis_id, or calibrate"
            )
        return
    if not isinstance(calibration, SharedBasis):
        raise FormatError(
            f"format {format.name!r} needs a calibration: make one with `spectral-paged calibrate "
            "MODEL` and pass calibration=SharedBasis.load(path), or use calibration='online'"
        )
    if len(calibration.v) != num_layers:
        raise FormatError(
            f"the calibration is of {len(calibration.v)} layers; the model has {num_layers}: "
            "calibrate the model that runs"
        )
    calibration.check(format)


def bind(
    calibration: SharedBasis | str | Path | None,
    format: PageFormat,
    num_layers: int,
    device: torch.device,
) -> BoundBasis | None:
    """The calibration bound to `format`; None if the format needs none or takes it online.

    Raises:
        FormatError: the calibration is missing, is for other heads or layers, or cannot be taken
            online.
    """
    check_calibration(calibration, format, num_layers)
    if not format.needs_calibration or not isinstance(calibration, SharedBasis):
        return None
    return calibration.bind(format, device)


class CacheBasis:
    """The calibration of one cache, given at construction or taken online.

    Online, the blocks due at the first seal decide the basis, so pages depend on the first blocks
    that the cache sees, and two caches may differ. The fingerprint contains the basis's id, so no
    page is read with another basis.

    Attributes:
        format: the page format, with the id of the basis once there is one.
        bound: the rows that pages share; None if the format needs none, and before the first seal
            of an online calibration.
    """

    def __init__(
        self,
        calibration: SharedBasis | str | Path | None,
        format: PageFormat,
        num_layers: int,
        device: torch.device,
    ) -> None:
        self._shape = (num_layers, format.num_kv_heads, format.head_dim)
        self._device = device
        self.format = format
        self.bound: BoundBasis | None = None
        self._rows = [Basis()] * num_layers
        self._projections: dict[tuple[int, ...], dict[str, Tensor]] = {}
        bound = bind(calibration, format, num_layers, device)
        if bound is not None:
            self._use(bound)

    def _use(self, bound: BoundBasis) -> None:
        self.bound, self.format = bound, bound.format
        if self.format.basis == "shared":
            # rows are rounded to fp16 already, which kernels read
            dtype = torch.float16 if self._device.type == "cuda" else torch.float32
            sides = bound.k.rows.to(dtype), bound.v.rows.to(dtype)
            self._rows = [Basis(k, v) for k, v in zip(*sides, strict=True)]

    @property
    def is_waiting(self) -> bool:
        """True if an online calibration has no basis yet."""
        return self.format.needs_calibration and self.bound is None

    def accumulator(self) -> BasisAccumulator:
        return BasisAccumulator(*self._shape)

    def freeze(self, accumulator: BasisAccumulator) -> None:
        """Bind the format to the basis of `accumulator`, for all later seals and reads."""
        plain = torch.eye(self._shape[-1]).expand(*self._shape, -1)
        basis = accumulator.finish(q_pre=plain, q_post=plain, o=plain, model_fingerprint="online")
        self._use(basis.bind(self.format, self._device))

    def rows(self, layer: int) -> Basis:
        """The basis rows that the layer's pages share; empty if pages have their own."""
        return self._rows[layer]

    def projections(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """`BoundBasis.projections`, made once for a group of layers."""
        key = tuple(layers)
        if key not in self._projections:
            assert self.bound is not None, "there is a basis before anything is sealed"
            self._projections[key] = self.bound.projections(key)
        return self._projections[key]
