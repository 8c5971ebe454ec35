"""A model is loaded, quantized and given places for adapters, as the options of an `LLM` say."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike

from spectral_paged.cache import SpectralKVCache
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import AdapterError
from spectral_paged.models.activation_memory import activation_bytes
from spectral_paged.models.cache_for_model import longest_sequence, model_cache
from spectral_paged.models.calibration import find_calibration, packed_obstacle
from spectral_paged.models.linear_weights import check_products
from spectral_paged.models.loader import LoadedModel, load_model
from spectral_paged.models.lora import LoadedAdapters
from spectral_paged.models.option_checks import (
    check_experts,
    check_fit,
    check_options,
    check_packed,
    format_of,
)
from spectral_paged.models.weight_quantization import check_device, check_quantized, quantized
from spectral_paged.options import LLMOptions, lora_modules
from spectral_paged.pages import PageFormat

logger = logging.getLogger(__name__)

UNCALIBRATED = "spectral-page"  # what `auto` takes for weights that cannot be read


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A model that only lacks a cache.

    options: those of the LLM, with a calibration that was found before weights were quantized.
    adapters: places for LoRA adapters in its layers, if the options want them.
    """

    loaded: LoadedModel
    format: PageFormat
    options: LLMOptions
    adapters: LoadedAdapters | None

    def cache(self) -> SpectralKVCache:
        """Make the cache of the model; it is measured with adapters, and calibrated without.

        Raises:
            SpectralPagedError: as in `model_cache`.
        """
        options, loaded, adapters = self.options, self.loaded, self.adapters
        reserved = 0
        if options.kv_cache_bytes is None:
            tokens = options.max_num_batched_tokens
            with nullcontext() if adapters is None else adapters.busiest(tokens):
                reserved = activation_bytes(
                    loaded.model,
                    loaded.geometry,
                    self.format,
                    num_tokens=tokens,
                    num_rows=options.max_decode_rows,
                    max_model_len=longest_sequence(loaded.geometry, options.max_model_len),
                    shares_reads=not options.disable_cascade_attn,
                )
        with nullcontext() if adapters is None else adapters.taken_out():
            return model_cache(
                loaded,
                self.format,
                options,
                gpu_memory_utilization=options.gpu_memory_utilization,
                reserved_bytes=reserved,
            )

    def close(self) -> None:
        """Give the model its own layers back."""
        if self.adapters is not None:
            self.adapters.close()


def ready_model(model: str | PathLike[str] | LoadedModel, options: LLMOptions) -> ReadyModel:
    """Load a model, unless it is loaded already, and make it what the options ask for.

    Options are judged before weights are read.

    Raises:
        SpectralPagedError: an option is wrong, or the model cannot be loaded or is not served.
    """
    check_options(options)
    if isinstance(model, LoadedModel):
        loaded, own = model, model.model
        check_quantized(loaded, options.quantization)
        check_experts(options, loaded.geometry, device=own.device, dtype=own.dtype)
        check_packed(options, own.config, device=own.device)
    else:
        where = choose_device(options.device)
        dtype = choose_dtype(options.dtype, where)
        check_device(options.quantization, where, dtype)
        loaded = load_model(
            model,
            device=where if options.quantization is None else choose_device("cpu"),
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            check=partial(check_fit, options, device=where, dtype=dtype),
        )
    if loaded.peft is not None and not options.enable_lora:
        raise loaded.peft.refused()
    longest_sequence(loaded.geometry, options.max_model_len)
    options = _with_own_format(options, loaded)
    format = format_of(options, loaded.geometry)
    if (method := options.quantization) is not None and loaded.quantization is None:
        basis = find_calibration(options.calibration, format, loaded, device=where)
        options = replace(options, calibration=basis)
        loaded = quantized(loaded, method, where)
    check_products(loaded.name, loaded.model)
    return ReadyModel(loaded, format, options, _adapters(loaded, options))


def _with_own_format(options: LLMOptions, loaded: LoadedModel) -> LLMOptions:
    """Return the options with a format that needs no calibration, where `auto` can have none."""
    wanted = options.kv_format == options.calibration == "auto"
    if not wanted or loaded.quantization is not None:
        return options
    if (reason := packed_obstacle(loaded)) is None:
        return options
    log = {"event": "format", "model": loaded.name, "kv_format": UNCALIBRATED, "reason": reason}
    logger.warning("kv_format is %s: %s", UNCALIBRATED, reason, extra=log)
    return replace(options, kv_format=UNCALIBRATED)


def _adapters(loaded: LoadedModel, options: LLMOptions) -> LoadedAdapters | None:
    """Return places for adapters, with those of the start in them."""
    if not options.enable_lora:
        return None
    modules = lora_modules(options.lora_modules)
    num_given = 0 if loaded.peft is None else len(loaded.peft.configs)
    if len(modules) + num_given > options.max_loras:
        raise AdapterError(
            f"the model has {num_given} adapters and lora_modules {len(modules)}, and max_loras is "
            f"{options.max_loras}: give max_loras={len(modules) + num_given}"
        )
    adapters = LoadedAdapters(
        loaded.model,
        max_loras=options.max_loras,
        max_lora_rank=options.max_lora_rank,
        peft=loaded.peft,
    )
    try:
        for module in modules:
            asked = replace(module, lora_int_id=adapters.next_id())
            adapters.add(asked, adapters.read(asked))
    except BaseException:
        adapters.close()
        raise
    return adapters
