"""The options of a cache, declared once; callables that make one take them by name or as an object.

```
LLM(model, max_num_seqs=64)                                  by name
LLM(model, cache_options=CacheOptions(max_num_seqs=64))      as an object, for several callables
```
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict

from spectral_paged.errors import shown
from spectral_paged.pages import SharedBasis


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The options of a cache, the same in `LLM`, `SpectralKVCache` and the integrations.

    Attributes:
        kv_cache_bytes: bytes of all arenas together, allocated once. The default is the part of
            `gpu_memory_utilization` that is free on the GPU, or 1 GiB on the CPU.
            `SpectralKVCache` has no default.
        max_num_seqs: most sequences in the cache at a time; default 256.
        max_model_len: longest sequence, tokens; default all positions of the model, or of the
            rotary tables.
        exempt_layers: numbers of the layers that stay exact; default none.
        calibration: the calibration for formats with a shared basis or calibrated weights. `auto`,
            the default, calibrates a model on the package's own text once and keeps the result in
            the cache folder; a `SharedBasis`; the path of a file that `spectral-paged calibrate`
            wrote; `online` takes the basis from the first blocks that are sealed (formats with
            `dim_weighting="none"`, so none of the presets). `SpectralKVCache` has no model to run,
            so it takes a `SharedBasis` or `online`.
        enable_prefix_caching: share slots between sequences with a common prefix; default True.
            Must be False if `prefill_segment` is 0.
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
        """The options of a call of `door`: values in `named`, else in `given`, else defaults.

        Args:
            fixed: options that `door` sets, which a caller may not name.

        Raises:
            TypeError: a name that `door` does not take; the message lists the names it takes.
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
                f"{door.__name__} takes no option {shown(unknown[0])}{meant} It takes "
                f"{', '.join(known)}"
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
