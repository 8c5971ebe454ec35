"""A cache for a transformers model: its geometry, rotary table, softmax scale and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from spectral_paged.cache import SpectralKVCache
from spectral_paged.device import choose_cache_bytes
from spectral_paged.errors import FormatError, InvalidRequestError, shown
from spectral_paged.models.calibration import find_calibration
from spectral_paged.models.geometry import ModelGeometry, layer_ropes
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.weights_digest import weights_digest
from spectral_paged.options import CacheOptions
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable


class Heads(Protocol):
    """The heads of a model's K and V, as `ModelGeometry` has them."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def model_format(
    kv_format: str | PageFormat, heads: Heads, *, prefill_segment: int = 2048
) -> PageFormat:
    """Return a preset's format for these heads, or the `PageFormat` given.

    Raises:
        FormatError: `kv_format` is neither a known preset nor a `PageFormat`.
    """
    if isinstance(kv_format, PageFormat):
        return kv_format
    if not isinstance(kv_format, str):
        raise FormatError(f"kv_format is {shown(kv_format)}; give a preset name or a PageFormat")
    return PageFormat.preset(
        kv_format,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        prefill_segment=prefill_segment,
    )


def longest_sequence(geometry: ModelGeometry, max_model_len: int | None) -> int:
    """Return `max_model_len`, by default the number of positions of the model.

    Raises:
        InvalidRequestError: it is less than 2, or more than the model's positions.
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
    options: CacheOptions,
    *,
    gpu_memory_utilization: float,
    reserved_bytes: int = 0,
    ropes: Sequence[RotaryTable | None] | None = None,
) -> SpectralKVCache:
    """Make a `SpectralKVCache` on the model's device and in its dtype.

    The model and its device fill in what `options` leave open: the longest sequence, the bytes,
    and a calibration where `format` needs one, which is found or made by running the model.

    Args:
        gpu_memory_utilization, reserved_bytes: as in `choose_cache_bytes`.
        ropes: each layer's rotary table, for a model that rotates by code of its own; default the
            model's.

    Raises:
        FormatError, CapacityError: as in `SpectralKVCache`.
        InvalidRequestError: as in `longest_sequence`, `choose_cache_bytes` and `find_calibration`.
        CorruptFileError: as in `find_calibration`.
    """
    geometry, model = loaded.geometry, loaded.model
    longest = longest_sequence(geometry, options.max_model_len)
    num_bytes = choose_cache_bytes(
        options.kv_cache_bytes, gpu_memory_utilization, model.device, reserved_bytes
    )
    options = replace(
        options,
        max_model_len=longest,
        kv_cache_bytes=num_bytes,
        calibration=find_calibration(options.calibration, format, loaded),
    )
    ropes = layer_ropes(model, longest, model.device) if ropes is None else ropes
    if options.kv_store is not None and options.model_fingerprint is None:
        options = replace(options, model_fingerprint=weights_digest(model, ropes))
    return SpectralKVCache(
        num_layers=geometry.num_layers,
        num_q_heads=geometry.num_q_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        rope=ropes,
        format=format,
        device=model.device,
        dtype=model.dtype,
        sliding_windows=geometry.windows,
        softmax_scale=float(model.model.layers[0].self_attn.scaling),
        softcap=geometry.softcap,
        attention_sinks=geometry.has_sinks,
        cache_options=options,
    )
