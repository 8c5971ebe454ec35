"""Options of an `LLM` are judged before weights are downloaded or read.

```
check_options    values that are wrong for every model, before a model is looked for
check_fit        values that are wrong for this model, once its config is read
```
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spectral_paged.cache import check_cache
from spectral_paged.device import check_utilization, choose_cache_bytes, choose_dtype
from spectral_paged.errors import AdapterError, FormatError, InvalidRequestError, shown
from spectral_paged.models.cache_for_model import Heads, longest_sequence, model_format
from spectral_paged.models.calibration import calibration_file
from spectral_paged.models.generation import check_choice
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.lora import check_folder
from spectral_paged.models.quantized_weights import is_packed, method_in, waits_for_the_host
from spectral_paged.models.weight_quantization import check_method
from spectral_paged.options import LLMOptions, lora_modules
from spectral_paged.pages import PageFormat, SharedBasis

GROUPED_CAPABILITY = (9, 0)  # from which torch groups products on the device


@dataclass(frozen=True, slots=True)
class AnyHeads:
    """Heads for which every preset has bands."""

    num_kv_heads: int = 1
    head_dim: int = 64


def check_options(options: LLMOptions) -> None:
    """Refuse values of options that are wrong for every model.

    Raises:
        FormatError: `kv_format` or `prefill_segment`.
        InvalidRequestError: any other option; the message says what it takes.
    """
    if options.max_num_batched_tokens < 1:
        raise InvalidRequestError(
            f"max_num_batched_tokens is {options.max_num_batched_tokens}; it must be an integer of "
            "at least 1"
        )
    if options.max_logprobs < -1:
        raise InvalidRequestError(
            f"max_logprobs is {options.max_logprobs}; it must be an integer of at least 0, or -1 "
            "for all"
        )
    format = format_of(options, AnyHeads())
    choose_dtype(options.dtype, torch.device("cpu"))
    check_utilization(options.gpu_memory_utilization)
    check_choice(options.generation_config)
    check_method(options.quantization)
    check_adapters(options)
    given = options.calibration
    if not (given is None or isinstance(given, SharedBasis | str | Path)):
        raise InvalidRequestError(
            f"calibration is {shown(given)}; it must be 'auto', 'online', a path or a SharedBasis"
        )
    if format.needs_calibration and isinstance(given, str | Path):
        calibration_file(given)


def check_adapters(options: LLMOptions) -> None:
    """Refuse options of LoRA that contradict, and adapters of the start by their configs.

    Raises:
        InvalidRequestError: a number is below 1, or there are adapters without `enable_lora`.
        AdapterError: there are too many of them, or one is not served.
    """
    for name in ("max_loras", "max_lora_rank"):
        if (value := getattr(options, name)) < 1:
            raise InvalidRequestError(f"{name} is {value}; it must be an integer of at least 1")
    modules = lora_modules(options.lora_modules)
    if modules and not options.enable_lora:
        raise InvalidRequestError("lora_modules needs enable_lora: give both, or neither")
    if len(modules) > options.max_loras:
        raise AdapterError(
            f"lora_modules has {len(modules)} adapters, and max_loras is {options.max_loras}: give "
            f"max_loras={len(modules)}"
        )
    for module in modules:
        check_folder(module.lora_name, module.lora_path, options.max_lora_rank)


def check_experts(
    options: LLMOptions, geometry: ModelGeometry, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse what a mixture of experts cannot be run with.

    Raises:
        InvalidRequestError: a quantization, which would leave experts out, or CUDA graphs where
            torch's grouped products wait for the host.
    """
    if not geometry.has_experts:
        return
    if options.quantization is not None:
        raise InvalidRequestError(
            f"quantization={options.quantization!r} quantizes linear layers, and the weights of "
            "experts are none, so most of this model would stay as it is: leave it out"
        )
    if device.type != "cuda" or options.enforce_eager:
        return
    if dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < GROUPED_CAPABILITY:
        raise InvalidRequestError(
            "the products of experts wait for the host, so no CUDA graph has them, but in bfloat16 "
            "on compute capability 9.0 or more: pass enforce_eager=True"
        )


def check_packed(options: LLMOptions, config: Any, *, device: torch.device) -> None:
    """Refuse what a model whose weights are packed already cannot be run with.

    Args:
        config: the model's transformers config.

    Raises:
        InvalidRequestError: another quantization of the same weights, or CUDA graphs where their
            products wait for the host.
    """
    if options.quantization is not None and is_packed(config):
        raise InvalidRequestError(
            f"quantization={options.quantization!r} quantizes 16-bit weights as they are loaded, "
            f"and those of this model are quantized already ({method_in(config)}): leave it out"
        )
    if device.type == "cuda" and not options.enforce_eager and waits_for_the_host(config):
        raise InvalidRequestError(
            "8-bit products of bitsandbytes look for outliers and wait for the host, so no CUDA "
            "graph has them: pass enforce_eager=True"
        )


def format_of(options: LLMOptions, heads: Heads) -> PageFormat:
    """Return the page format of an `LLM` for these heads.

    Raises:
        FormatError: it is unknown, or has `prefill_segment=0`, for an LLM's scheduler cuts prompts.
    """
    format = model_format(options.kv_format, heads, prefill_segment=options.prefill_segment)
    if not format.prefill_segment:
        raise FormatError(
            f"format {format.name!r} has prefill_segment=0, so what queries see would depend "
            "on how the scheduler cuts prompts: use a multiple of 512"
        )
    return format


def check_fit(
    options: LLMOptions,
    geometry: ModelGeometry,
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Refuse a format or options of a cache that do not fit a model.

    The bytes of a cache on CUDA that has no `kv_cache_bytes` are known once the weights are there.

    Raises:
        FormatError, CapacityError: as in `SpectralKVCache`.
        InvalidRequestError: as in `longest_sequence`.
        CorruptFileError: the calibration's file is damaged.
    """
    check_experts(options, geometry, device=device, dtype=dtype)
    check_packed(options, config, device=device)
    format, longest = (
        format_of(options, geometry),
        longest_sequence(geometry, options.max_model_len),
    )
    given, num_bytes = options.calibration, options.kv_cache_bytes
    if format.needs_calibration and isinstance(given, str | Path):
        path = calibration_file(given)
        given = given if path is None else SharedBasis.load(path)
    if num_bytes is None and device.type != "cuda":
        num_bytes = choose_cache_bytes(None, 1.0, device)
    check_cache(
        format,
        replace(options, calibration=given, kv_cache_bytes=num_bytes, max_model_len=longest),
        num_layers=geometry.num_layers,
        num_q_heads=geometry.num_q_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        sliding_windows=geometry.windows,
        device=device,
        dtype=dtype,
    )
