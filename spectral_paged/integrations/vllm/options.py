"""The options of pages inside vLLM travel in its `additional_config`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from spectral_paged.errors import FormatError, InvalidRequestError, shown, suggestion
from spectral_paged.options import CacheOptions
from spectral_paged.pages import PRESETS

KEY = "spectral_paged"  # of `additional_config`
HERE = __name__.rpartition(".")[0]
WORKER = f"{HERE}.worker.SpectralWorker"
SCHEDULER = f"{HERE}.scheduler.SpectralScheduler"
BACKEND = f"{HERE}.backend.SpectralBackend"
SPARE_ROWS = 8  # vLLM's null block, and requests of its warm-up that no scheduler knows


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """The options of pages inside vLLM; every other option is vLLM's own.

    Attributes:
        kv_format: name of a page format's preset.
        calibration: for formats with a shared basis or calibrated weights. `auto` makes one on the
            package's own text, once for a model, and keeps it where `LLM` does; `online` takes the
            basis from the first blocks; otherwise the path of a file that
            `spectral-paged calibrate` wrote.
        prefill_segment: tokens of a prompt that attend to each other exactly, before blocks behind
            them are read as pages; the most that one step computes of a prompt.
        exempt_layers: numbers of the layers that stay exact.
        kv_host_memory: bytes of host memory for prompts beyond those that the pages hold, also a
            text such as `32GiB`; None: none.
        kv_store: folder in which prompts outlive the process, and which other processes may share;
            None: none.
        kv_store_size: most bytes of the folder's records together.
    """

    kv_format: str = "auto"
    calibration: str = "auto"
    prefill_segment: int = 2048
    exempt_layers: tuple[int, ...] = ()
    kv_host_memory: int | str | None = CacheOptions.kv_host_memory
    kv_store: str | None = None
    kv_store_size: int | str = CacheOptions.kv_store_size

    @property
    def keeps(self) -> bool:
        """True if prompts outlive their pages, in host memory or a folder."""
        return self.kv_host_memory is not None or self.kv_store is not None

    @classmethod
    def of(cls, additional_config: Mapping[str, Any] | None) -> PageOptions:
        """Read the options out of vLLM's `additional_config`.

        Raises:
            InvalidRequestError: an option that does not exist, or a value of the wrong type.
            FormatError: an unknown preset.
        """
        given = (additional_config or {}).get(KEY, {})
        if not isinstance(given, Mapping):
            raise InvalidRequestError(
                f"additional_config[{KEY!r}] is {shown(given)}; give an object"
            )
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            meant = suggestion(unknown[0], known)
            raise InvalidRequestError(
                f"additional_config[{KEY!r}] has no option {shown(unknown[0])}"
                f"{f': {meant}' if meant else '.'} It has {', '.join(known)}"
            )
        return cls(**given).checked()

    def checked(self) -> PageOptions:
        """Return these options with plain types.

        Raises:
            InvalidRequestError, FormatError: as in `of`.
        """
        if not isinstance(self.kv_format, str) or self.kv_format not in ("auto", *PRESETS):
            raise FormatError(
                f"kv_format is {shown(self.kv_format)}; inside vLLM it is the name of a preset: "
                f"auto, {', '.join(PRESETS)}"
            )
        if not isinstance(self.calibration, str | Path):
            raise InvalidRequestError(
                f"calibration is {shown(self.calibration)}; inside vLLM it is 'auto', 'online' or "
                "a path"
            )
        layers = self.exempt_layers
        if isinstance(layers, str) or not all(type(n) is int and n >= 0 for n in layers):
            raise InvalidRequestError(
                f"exempt_layers is {shown(layers)}; give a list of layer numbers"
            )
        if type(self.prefill_segment) is not int:
            raise InvalidRequestError(
                f"prefill_segment is {shown(self.prefill_segment)}; give tokens"
            )
        if not isinstance(self.kv_store, str | Path | None):
            raise InvalidRequestError(f"kv_store is {shown(self.kv_store)}; give a folder's path")
        for name in ("kv_host_memory", "kv_store_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | str | None):
                raise InvalidRequestError(
                    f"{name} is {shown(value)}; give bytes, or a text such as '32GiB'"
                )
        return replace(
            self,
            calibration=str(self.calibration),
            exempt_layers=tuple(layers),
            kv_store=None if self.kv_store is None else str(self.kv_store),
        )

    @property
    def named(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON knows them."""
        default = PageOptions()
        found = {n: v for n, v in asdict(self).items() if v != getattr(default, n)}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}


def _own_args(max_num_seqs: int) -> dict[str, Any]:
    """The arguments of vLLM that pages set, by vLLM's names in Python."""
    return {
        "attention_backend": "CUSTOM",
        "worker_cls": WORKER,
        "scheduler_cls": SCHEDULER,
        "max_num_seqs": max_num_seqs,
        "num_gpu_blocks_override": max_num_seqs + SPARE_ROWS,
    }


def engine_args(
    *,
    max_num_seqs: int = 256,
    additional_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`, `AsyncEngineArgs` or `EngineArgs` that bring pages in.

    Args:
        max_num_seqs: vLLM's option; pages need it here, because every request has a row.
        additional_config: vLLM's option; the pages' own part is added to it.
        options: those of `PageOptions`, such as `kv_format`; others are vLLM's and are passed on.

    Raises:
        InvalidRequestError, FormatError: a value that is not served.
        TypeError: an argument of vLLM that pages set themselves.
    """
    names = {field.name for field in fields(PageOptions)}
    pages = PageOptions(**{n: v for n, v in options.items() if n in names}).checked()
    others = {n: v for n, v in options.items() if n not in names}
    own = _own_args(max_num_seqs)
    taken = sorted(own.keys() & others.keys())
    if taken:
        raise TypeError(f"engine_args sets {', '.join(taken)} itself: leave it out")
    return {
        **own,
        "additional_config": {**(additional_config or {}), KEY: pages.named},
        **others,
    }


def serve_flags(model: str, *, max_num_seqs: int = 256, **options: Any) -> list[str]:
    """Return the arguments of `vllm serve` that serve `model` with pages.

    No argument has a character that a shell treats specially, unless a path has.

    Args:
        options: as in `PageOptions`.

    Raises:
        InvalidRequestError, FormatError: a value that is not served.
    """
    pages = PageOptions(**options).checked().named
    named = {name.replace("_", "-"): value for name, value in _own_args(max_num_seqs).items()}
    named |= {f"additional-config.{KEY}.{name}": value for name, value in pages.items()}
    flags = [model]
    for name, value in named.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        flags += [f"--{name}", text]
    return flags
