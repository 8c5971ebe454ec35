"""A cache for a transformers model: its geometry, rotary table, softmax scale and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectral_paged.cache import SpectralKVCache
from spectral_paged.errors import FormatError, InvalidRequestError
from spectral_paged.models.calibration import find_calibration
from spectral_paged.models.geometry import ModelGeometry, layer_ropes
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import PageFormat, SharedBasis
from spectral_paged.rope import RotaryTable


def model_format(
    kv_format: str | PageFormat, geometry: ModelGeometry, *, prefill_segment: int = 2048
) -> PageFormat:
    """The format that `kv_format` means: a preset's for this geometry, or the one given.

    Raises:
        FormatError: neither a known preset nor a `PageFormat`.
    """
    if isinstance(kv_format, PageFormat):
        return kv_format
    if not isinstance(kv_format, str):
        raise FormatError(f"kv_format is {kv_format!r}; give a preset name or a PageFormat")
    return PageFormat.preset(
        kv_format,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        prefill_segment=prefill_segment,
    )


def longest_sequence(geometry: ModelGeometry, max_model_len: int | None) -> int:
    """`max_model_len`, by default all positions of the model.

    Raises:
        InvalidRequestError: more than the model has, or not 2.
    """
    longest = geometry.max_position_embeddings if max_model_len is None else max_model_len
    if not 1 < longest <= geometry.max_position_embeddings:
        raise InvalidRequestError(
            f"max_model_len is {longest}; this model takes 2 to {geometry.max_position_embeddings}"
        )
    return longest


def model_cache(
    loaded: LoadedModel,
    format: PageFormat,
    *,
    kv_cache_bytes: int,
    max_num_seqs: int,
    max_model_len: int,
    exempt_layers: Sequence[int] = (),
    calibration: SharedBasis | str | Path = "auto",
    enable_prefix_caching: bool = True,
    poison: bool = False,
    ropes: Sequence[RotaryTable | None] | None = None,
) -> SpectralKVCache:
    """A `SpectralKVCache` on the model's device and in its dtype.

    Args:
        ropes: each layer's rotary table, for a model that rotates by code of its own; default the
            model's.
        calibration: as in `LLM`; found, or made by running the model, where `format` needs one.
        others: as in `SpectralKVCache`.

    Raises:
        FormatError, CapacityError: as `SpectralKVCache`.
        CorruptFileError, InvalidRequestError: as `find_calibration`.
    """
    geometry, model = loaded.geometry, loaded.model
    return SpectralKVCache(
        num_layers=geometry.num_layers,
        num_q_heads=geometry.num_q_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        rope=layer_ropes(model, max_model_len, model.device) if ropes is None else ropes,
        format=format,
        device=model.device,
        dtype=model.dtype,
        kv_cache_bytes=kv_cache_bytes,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        sliding_windows=geometry.windows,
        exempt_layers=exempt_layers,
        calibration=find_calibration(calibration, format, loaded),
        softmax_scale=float(model.model.layers[0].self_attn.scaling),
        softcap=geometry.softcap,
        enable_prefix_caching=enable_prefix_caching,
        poison=poison,
    )
