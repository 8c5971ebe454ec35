"""The presets are named page formats, with bands for every head width."""

from __future__ import annotations

from typing import Any

from spectral_paged.errors import FormatError, shown, suggestion
from spectral_paged.pages.sections import Bands

# K and V ranks of the reference format by head width.
REFERENCE_RANKS = {64: (16, 32), 96: (32, 48), 128: (32, 64), 256: (48, 96)}
PRESETS = (
    "exact",
    "spectral-int8",
    "spectral-int8-post",
    "spectral-page",
    "spectral-quality",
    "spectral-compact",
)
AUTO = "spectral-quality"

# fields that the mixed-bit presets share; decision 0010 measures each of them
MIXED = {"rope": "frame", "gain": True, "band_rotation": True, "outlier_slots": 4}
CALIBRATED = {"basis": "shared", "dim_weighting": "calibrated"}
IN_PAGE = {"basis": "page", "basis_bits": 4}  # a page that needs no calibration


MIXED_BANDS: dict[str, dict[int, tuple[Bands, Bands]]] = {
    "spectral-page": {
        64: (((32, 4), (32, 2)), ((32, 3), (32, 2))),
        96: (((48, 4), (32, 2)), ((48, 3), (48, 2))),
        128: (((64, 4), (32, 2)), ((64, 3), (64, 2))),
        256: (((96, 4), (64, 2)), ((96, 3), (160, 2))),
    },
    "spectral-quality": {
        64: (((32, 4), (32, 2)), ((64, 3),)),
        96: (((64, 4), (32, 2)), ((96, 3),)),
        128: (((64, 4), (64, 2)), ((128, 3),)),
        256: (((128, 4), (128, 2)), ((256, 3),)),
    },
    "spectral-compact": {
        64: (((32, 4), (32, 2)), ((64, 2),)),
        96: (((48, 4), (32, 2)), ((48, 3), (48, 2))),
        128: (((64, 4), (32, 2)), ((64, 3), (64, 2))),
        256: (((128, 4), (64, 2)), ((128, 3), (128, 2))),
    },
}


def preset_fields(name: str, head_dim: int) -> dict[str, Any]:
    """The fields of `PageFormat` that preset `name` sets for heads of width `head_dim`.

    Raises:
        FormatError: unknown preset, or a head width it has no bands for.
    """
    if name == "auto":
        name = AUTO
    if name not in PRESETS:
        meant = suggestion(name, PRESETS)
        raise FormatError(
            f"unknown kv_format {shown(name)};{f' {meant}' if meant else ''} presets are 'auto', "
            f"{', '.join(map(repr, PRESETS))}"
        )
    if name == "exact":
        return {"name": name}
    if name in MIXED_BANDS:
        k_bands, v_bands = mixed_bands(name, head_dim)
        basis = IN_PAGE if name == "spectral-page" else CALIBRATED
        return {"name": name, "k_bands": k_bands, "v_bands": v_bands, **MIXED, **basis}
    k_rank, v_rank = _reference_ranks(name, head_dim)
    return {
        "name": name,
        "k_bands": ((k_rank, 8),),
        "v_bands": ((v_rank, 8),),
        "rope": "post" if name == "spectral-int8-post" else "frame",
    }


def _reference_ranks(name: str, head_dim: int) -> tuple[int, int]:
    if head_dim in REFERENCE_RANKS:
        return REFERENCE_RANKS[head_dim]
    if head_dim < 64:
        return max(16, head_dim // 64 * 16), max(16, head_dim // 32 * 16)
    raise FormatError(
        f"preset {name!r} has no ranks for head_dim {head_dim}; it knows "
        f"{sorted(REFERENCE_RANKS)}: pass a PageFormat with ranks of your own"
    )


def mixed_bands(name: str, head_dim: int) -> tuple[Bands, Bands]:
    """The bands of K and V of a mixed-bit preset.

    V needs every component, K nearly every one (decision 0011). Kernels with explicit layouts read
    the counts of widths 64 and 128, which were measured; 96 and 256 follow in proportion.
    """
    known = MIXED_BANDS[name]
    if head_dim in known:
        return known[head_dim]
    k_bits, v_bits = (3, 2) if name == "spectral-compact" else (4, 3)
    return ((head_dim, k_bits),), ((head_dim, v_bits),)
