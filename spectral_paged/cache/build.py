"""The construction of a cache's layer groups: layers that are alike share an arena and tables."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

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
from spectral_paged.errors import CapacityError, FormatError, InvalidRequestError, shown
from spectral_paged.kernels.decode.shared_pages import seats_per_tile
from spectral_paged.kernels.ops import page_ops
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.options import CacheOptions
from spectral_paged.pages import PageFormat
from spectral_paged.pool.arena import Arena, SlabPlan
from spectral_paged.rope import RotaryTable
from spectral_paged.store import (
    CudaCopier,
    DiskTier,
    Folder,
    HostCopier,
    HostMemory,
    HostRecord,
    HostTier,
    Tiers,
)

PASSING_BYTES = 1 << 30  # of host memory, where pages only pass through it to disk and back
PASSING_RECORDS = 8  # of the largest, at least


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
    _check_store(format, options)
    try:
        if format.seals:
            page_ops(device).check_layout(format.layout)
    except ValueError as error:
        raise FormatError(f"format {format.name!r}: {error}") from error


def _check_store(format: PageFormat, options: CacheOptions) -> None:
    """Raise if a store is asked for that nothing could be found in."""
    for name in ("kv_host_memory", "kv_store"):
        if getattr(options, name) is not None and not options.enable_prefix_caching:
            raise InvalidRequestError(
                f"{name} keeps prefixes for later requests, and enable_prefix_caching is False: "
                "leave one of them out"
            )
    if options.kv_store is None:
        return
    if format.needs_calibration and options.calibration == "online":
        raise FormatError(
            "kv_store keeps pages for other runs, and calibration='online' makes a basis that no "
            "other run has: calibrate the model, or keep prefixes in kv_host_memory alone"
        )


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
    num_q_heads: int,
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
    seats = 0
    if not options.disable_cascade_attn:
        seats = seats_per_tile(num_q_heads // format.num_kv_heads)
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
                seats_per_tile=seats,
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
        CapacityError: `kv_host_memory` or `kv_store_size` holds no prefix, or the system does not
            give so much.
        InvalidRequestError: `kv_store` is no folder and cannot become one, or nothing says of which
            model its pages are.
    """
    records = Records(groups, visibility)
    num_bytes, disk_bytes = options.kv_host_memory, options.kv_store_size
    if num_bytes is None and options.kv_store is None:
        return LowerTiers(groups, records, visibility, None)
    largest, usual = records.sizes(max_model_len)
    if not largest:
        raise CapacityError(
            f"a store is given, and no prompt of up to max_model_len {max_model_len} tokens has a "
            "prefix that is kept there: raise it, or leave kv_host_memory and kv_store out"
        )
    if num_bytes is None:
        num_bytes = max(PASSING_BYTES, PASSING_RECORDS * largest)
    assert isinstance(num_bytes, int) and isinstance(disk_bytes, int), "texts are read by now"
    memory = HostMemory.of(
        num_bytes, largest=largest, usual=usual, device=device, poison=options.debug_poison
    )
    host = HostTier(memory, CudaCopier(device) if device.type == "cuda" else HostCopier())
    disk: DiskTier[HostRecord] | None = None
    if options.kv_store is not None:
        if disk_bytes < largest + usual:
            raise CapacityError(
                f"kv_store_size is {disk_bytes} bytes; a prefix of this cache takes at least "
                f"{largest + usual}: give more"
            )
        if options.model_fingerprint is None:
            raise InvalidRequestError(
                "kv_store keeps pages that later runs may find, and nothing says of which model: "
                "give model_fingerprint, such as a digest of its weights"
            )
        identity = _identity(groups, options.model_fingerprint, device)
        disk = DiskTier(_folder(options.kv_store, disk_bytes), identity)
    return LowerTiers(groups, records, visibility, Tiers(host, disk))


def _folder(path: str | PathLike[str], max_bytes: int) -> Folder:
    try:
        return Folder(Path(path).expanduser(), max_bytes)
    except OSError as error:
        raise InvalidRequestError(
            f"kv_store {shown(str(path))} cannot be a folder of pages ({error.strerror}): name one "
            "that you may write"
        ) from error


def _identity(groups: list[LayerGroup], fingerprint: str, device: torch.device) -> bytes:
    """32 bytes that are the same only for caches whose records hold the same for the same keys.

    Keys contain the format; here is what makes K and V of it, and how a record is cut.
    """
    said: list[object] = [fingerprint, device.type]
    for group in groups:
        arena, rope = group.arena, group.rope
        table = b"" if rope is None else rope.cos[:64].cpu().contiguous().numpy().tobytes()
        sizes = (arena.exact_bytes, arena.page_bytes, str(arena.dtype))
        said.append((group.layers, repr(group.retention), sizes, table))
    return hashlib.sha256(repr(said).encode()).digest()
