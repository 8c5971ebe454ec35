"""Where a cache's calibration comes from: given, or taken from the first blocks it seals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spectral_paged.errors import FormatError
from spectral_paged.page_format import PageFormat
from spectral_paged.shared_basis import BasisAccumulator, BoundBasis, SharedBasis


def bind(
    calibration: SharedBasis | Literal["online"] | None,
    format: PageFormat,
    num_layers: int,
    device: torch.device,
) -> BoundBasis | None:
    """The calibration as `format` uses it; None where it needs none, or takes it online.

    Raises:
        FormatError: it is needed and missing, is for other heads or layers, or cannot be taken
            online.
    """
    if not format.needs_calibration:
        return None
    if calibration == "online":
        if format.dim_weighting != "none" or format.basis_id:
            raise FormatError(
                f"format {format.name!r} needs the weights of a real calibration; online there is "
                "only a basis: use dim_weighting='none' and no basis_id, or calibrate"
            )
        return None
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
    return calibration.bind(format, device)


class CacheBasis:
    """The calibration of one cache: given at once, or taken online.

    Online, the blocks due at the first seal decide the basis. Pages then depend on what the cache
    saw first. Its id enters the fingerprint, so no page is ever read with another basis; two caches
    need not agree.

    Attributes:
        format: the page format; it carries the id of the basis once there is one.
        bound: the rows that pages share; None without, and online before the first seal.
    """

    def __init__(
        self,
        calibration: SharedBasis | Literal["online"] | None,
        format: PageFormat,
        num_layers: int,
        device: torch.device,
    ) -> None:
        self.bound = bind(calibration, format, num_layers, device)
        self.format = format if self.bound is None else self.bound.format
        self._shape = (num_layers, format.num_kv_heads, format.head_dim)
        self._device = device

    @property
    def is_waiting(self) -> bool:
        """True before the first seal of an online calibration."""
        return self.format.needs_calibration and self.bound is None

    def accumulator(self) -> BasisAccumulator:
        return BasisAccumulator(*self._shape)

    def freeze(self, accumulator: BasisAccumulator) -> None:
        """Use what was accumulated from now on."""
        plain = torch.eye(self._shape[-1]).expand(*self._shape, -1)
        basis = accumulator.finish(q_pre=plain, q_post=plain, o=plain, model_fingerprint="online")
        self.bound = basis.bind(self.format, self._device)
        self.format = self.bound.format

    def rows(self, layer: int) -> dict[str, Tensor]:
        """The layer's rows `[H, rank, D]` as arguments of page ops; none where pages have them."""
        if self.bound is None or self.format.basis != "shared":
            return {}
        return {"k_basis": self.bound.k.rows[layer], "v_basis": self.bound.v.rows[layer]}
