"""The construction of a cache's layer groups: layers that are alike share an arena and tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectral_paged.cache.cache_basis import CacheBasis, check_calibration
from spectral_paged.cache.capacity import Share, divide
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.layer_spec import LayerSpec, reached_windows
from spectral_paged.cache.lower_tiers import LowerTiers
from spectral_paged.cache.pins import MAX_PINNED_BLOCKS
from spectral_paged.cache.records import Records
from spectral_paged.cache.retention import Retention, retention_of
from spectral_paged.cache.visibility import Visibility
from spectral_paged.device import check_device
from spectral_paged.errors import CapacityError, FormatError, InvalidRequestError
from spectral_paged.kernels.ops import page_ops
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.options import CacheOptions
from spectral_paged.pages import PageFormat
from spectral_paged.pool.arena import Arena, SlabPlan
from spectral_paged.rope import RotaryTable
from spectral_paged.store import CudaCopier, HostCopier, HostMemory, HostTier


def check_shape(
    format: PageFormat,
    options: CacheOptions,
    num_layers: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raise if the format does not fit the model, the options or the device's kernels.

    Raises:
        FormatError: names the value, the limit and the remedy.
        InvalidRequestError: host memory for prefixes, and no prefix caching; no kernel serves the
            device, or it does not compute in `dtype`.
    """
    check_device(device, dtype)
    if (format.num_kv_heads, format.head_dim) != (num_kv_heads, head_dim):
        raise FormatError(
            f"format {format.name!r} is for {format.num_kv_heads} KV heads of width "
            f"{format.head_dim}; the model has {num_kv_heads} of {head_dim}"
        )
    if num_q_heads % num_kv_heads:
        raise FormatError(f"{num_q_heads} query heads do not divide over {num_kv_heads} KV heads")
    bad = [i for i in options.exempt_layers if not 0 <= i < num_layers]
    if bad:
        raise FormatError(f"exempt layers {bad} do not exist; the model has {num_layers} layers")
    if options.enable_prefix_caching and not format.prefill_segment:
        raise FormatError(
            f"format {format.name!r} has prefill_segment=0, so what its pages hold depends on how "
            "prompts were cut, and no other prompt may find them: pass enable_prefix_caching=False"
        )
    if options.kv_host_memory is not None and not options.enable_prefix_caching:
        raise InvalidRequestError(
            "kv_host_memory keeps prefixes for later requests, and enable_prefix_caching is False: "
            "leave one of them out"
        )
    try:
        if format.seals:
            page_ops(device).check_layout(format.layout)
    except ValueError as error:
        raise FormatError(f"format {format.name!r}: {error}") from error


def check_cache(
    format: PageFormat,
    options: CacheOptions,
    *,
    num_layers: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sliding_windows: Sequence[int | None],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Refuse what `SpectralKVCache` would refuse, before there are rotary tables or memory for it.

    Args:
        options: `max_model_len` must be set. The calibration may be `auto`, which is not checked;
            without `kv_cache_bytes` the capacity is not.

    Raises:
        FormatError, CapacityError, InvalidRequestError: as in `SpectralKVCache`.
    """
    heads = num_q_heads, num_kv_heads, head_dim
    check_shape(format, options, num_layers, *heads, device, dtype)
    if options.calibration != "auto":
        check_calibration(options.calibration, format, num_layers)
    longest = options.max_model_len
    assert longest is not None
    windows = reached_windows(sliding_windows, longest)
    # tables divide groups further, but no layer gets fewer bytes for it
    kinds = _kinds(format, [LayerSpec(None, window) for window in windows], options.exempt_layers)
    is_online = format.needs_calibration and options.calibration == "online"
    _check_online(is_online, sum(retention.seals for retention, _ in kinds))
    if options.kv_cache_bytes is not None:
        _shares(format, kinds, options, dtype.itemsize)


def _check_online(is_online: bool, num_sealing: int) -> None:
    """Raise if an online calibration would see only some of the layers at the first seal.

    Raises:
        FormatError: several groups seal; the message names the alternatives.
    """
    if is_online and num_sealing > 1:
        raise FormatError(
            f"calibration='online' takes the basis from the first blocks sealed, and {num_sealing} "
            "groups of this model's layers seal blocks of their own: calibrate the model, or use a "
            "format whose pages have their own basis (spectral-page)"
        )


def _kinds(
    format: PageFormat, specs: Sequence[LayerSpec], exempt: Sequence[int]
) -> dict[tuple[Retention, RotaryTable | None], list[int]]:
    """The layers of each retention and rotary table, sealing ones first.

    The table counts only where blocks are sealed; elsewhere nothing turns keys back.
    """
    kinds: dict[tuple[Retention, RotaryTable | None], list[int]] = {}
    for layer, spec in enumerate(specs):
        kept = retention_of(format, spec.window, exempt=layer in exempt)
        kinds.setdefault((kept, spec.rope if kept.seals else None), []).append(layer)
    return dict(sorted(kinds.items(), key=lambda item: not item[0][0].seals))


def _shares(
    format: PageFormat,
    kinds: dict[tuple[Retention, RotaryTable | None], list[int]],
    options: CacheOptions,
    itemsize: int,
) -> list[int]:
    """The bytes of each kind of layers.

    Raises:
        CapacityError: a share is too small for two slabs.
    """
    total = options.kv_cache_bytes
    assert total is not None and options.max_model_len is not None
    shares = divide(
        format,
        [Share(len(layers), retention) for (retention, _), layers in kinds.items()],
        total,
        itemsize=itemsize,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
    )
    for ((retention, _), layers), budget_bytes in zip(kinds.items(), shares, strict=True):
        SlabPlan.of(
            format,
            num_layers=len(layers),
            itemsize=itemsize,
            budget_bytes=budget_bytes,
            exact_only=not retention.seals,
            total_bytes=total,
        )
    return shares


def build_groups(
    basis: CacheBasis,
    specs: Sequence[LayerSpec],
    options: CacheOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerGroup]:
    """Make the layer groups and allocate their arenas; `capacity.divide` divides the memory.

    Layers with the same retention, and the same rotary table where they seal, form a group
    (decision 0033).

    Args:
        options: `kv_cache_bytes` and `max_model_len` must be set.

    Raises:
        CapacityError: a group's share is too small for two slabs.
        FormatError: several groups seal, and an online calibration would see only one of them.
    """
    format, max_model_len = basis.format, options.max_model_len
    assert max_model_len is not None
    kinds = _kinds(format, specs, options.exempt_layers)
    _check_online(basis.is_waiting, sum(retention.seals for retention, _ in kinds))
    shares = _shares(format, kinds, options, dtype.itemsize)
    groups = []
    for ((retention, rope), layers), budget_bytes in zip(kinds.items(), shares, strict=True):
        arena = Arena(
            format,
            num_layers=len(layers),
            dtype=dtype,
            device=device,
            budget_bytes=budget_bytes,
            exact_only=not retention.seals,
            debug_poison=options.debug_poison,
        )
        most = retention.at_peak(max_model_len, pinned=tuple(range(MAX_PINNED_BLOCKS)))
        groups.append(
            LayerGroup(
                layers,
                arena,
                retention,
                rope,
                max_rows=options.max_num_seqs,
                max_exact_pages=most.num_exact + 1,
                max_pages=retention.num_sealed(-(-max_model_len // BLOCK_TOKENS)),
            )
        )
    return groups


def lower_tiers(
    groups: list[LayerGroup],
    visibility: Visibility,
    options: CacheOptions,
    max_model_len: int,
    device: torch.device,
) -> LowerTiers:
    """The tiers below the pool that `options` ask for.

    Raises:
        CapacityError: `kv_host_memory` holds no prefix, or the system does not give so much.
    """
    records = Records(groups, visibility)
    num_bytes = options.kv_host_memory
    if num_bytes is None:
        return LowerTiers(groups, records, visibility, None)
    assert isinstance(num_bytes, int), "CacheOptions has read the text"
    largest, usual = records.sizes(max_model_len)
    if not largest:
        raise CapacityError(
            f"kv_host_memory is given, and no prompt of up to max_model_len {max_model_len} tokens "
            "has a prefix that is kept there: raise it, or leave kv_host_memory out"
        )
    memory = HostMemory.of(
        num_bytes, largest=largest, usual=usual, device=device, poison=options.debug_poison
    )
    copier = CudaCopier(device) if device.type == "cuda" else HostCopier()
    return LowerTiers(groups, records, visibility, HostTier(memory, copier))
