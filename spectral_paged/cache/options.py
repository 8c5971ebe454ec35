"""The options of a cache, said once: whoever makes one takes `CacheOptions`, or its fields by name.

```
LLM(model, max_num_seqs=64)                                  by name
LLM(model, cache_options=CacheOptions(max_num_seqs=64))      as an object, which doors may share
```
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict

from spectral_paged.pages import SharedBasis


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What a cache may hold, and how; the same in `LLM`, `SpectralKVCache` and the integrations.

    Attributes:
        kv_cache_bytes: bytes of all arenas together, allocated once. Default what
            `gpu_memory_utilization` leaves of the GPU, or 1 GiB on the CPU; a `SpectralKVCache`
            that is made by itself must be told.
        max_num_seqs: sequences (rows of a batch) held at a time; default 256.
        max_model_len: longest sequence, tokens; default all positions of the model, or of the
            rotary tables.
        exempt_layers: numbers of the layers that stay exact; default none.
        calibration: what formats with a shared basis or calibrated weights need. `auto`, the
            default, calibrates a model on the package's own text once and keeps the result in the
            cache folder; a `SharedBasis`; the path of a file that `spectral-paged calibrate`
            wrote; `online` takes the basis from the first blocks that are sealed (formats with
            `dim_weighting="none"`, so none of the presets). A `SpectralKVCache` that is made by
            itself has no model to run: it takes a `SharedBasis` or `online`.
        enable_prefix_caching: share slots between sequences with a common beginning; default True.
            Not where `prefill_segment` is 0.
        debug_poison: fill freed slots with NaN bytes, so that a stale read shows; default False.
    """

    kv_cache_bytes: int | None = None
    max_num_seqs: int = 256
    max_model_len: int | None = None
    exempt_layers: Sequence[int] = ()
    calibration: SharedBasis | str | Path | None = "auto"
    enable_prefix_caching: bool = True
    debug_poison: bool = False

    @classmethod
    def of(
        cls,
        door: Callable[..., object],
        given: CacheOptions | None,
        named: Mapping[str, Any],
        **fixed: Any,
    ) -> CacheOptions:
        """The options that a call of `door` means: those named, else those given, else defaults.

        Args:
            fixed: options that `door` decides by itself, so nobody may name them.

        Raises:
            TypeError: a name that `door` does not take; the message lists those it does.
        """
        own = [field.name for field in fields(cls) if field.name not in fixed]
        unknown = [name for name in named if name not in own]
        if unknown:
            kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
            taken = inspect.signature(door).parameters.values()
            known = sorted([*own, *(p.name for p in taken if p.kind in kinds)])
            close = get_close_matches(unknown[0], known, n=1)
            meant = f": did you mean {close[0]!r}?" if close else "."
            raise TypeError(
                f"{door.__name__} takes no option {unknown[0]!r}{meant} It takes {', '.join(known)}"
            )
        return replace(given or cls(), **named, **fixed)


class CacheOptionsDict(TypedDict, total=False):
    """The fields of `CacheOptions` as keywords of a call; for type checkers and editors."""

    kv_cache_bytes: int | None
    max_num_seqs: int
    max_model_len: int | None
    exempt_layers: Sequence[int]
    calibration: SharedBasis | str | Path | None
    enable_prefix_caching: bool
    debug_poison: bool
