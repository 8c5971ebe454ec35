"""What pages inside vLLM do not serve is refused by name, before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spectral_paged.errors import InvalidRequestError
from spectral_paged.integrations.vllm.options import SCHEDULER, SPARE_ROWS, WORKER, PageOptions

ONE_GPU = "pages of one engine lie on one GPU: start one engine a GPU, behind a router"


def obstacles(config: Any) -> Iterator[str]:
    """Yield what a `VllmConfig` asks for and pages do not serve, each with the remedy."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    model, cache = config.model_config, config.cache_config
    if parallel.world_size > 1:
        yield (
            f"tensor_parallel_size {parallel.tensor_parallel_size} and pipeline_parallel_size "
            f"{parallel.pipeline_parallel_size}: {ONE_GPU}"
        )
    if parallel.data_parallel_size > 1:
        yield f"data_parallel_size {parallel.data_parallel_size}: {ONE_GPU}"
    if config.speculative_config is not None:
        yield "speculative decoding takes tokens back, which a page cannot: drop speculative_config"
    if config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        yield (
            "KV connectors and offloading move blocks of vLLM's: drop kv_transfer_config and "
            "kv_offloading_size"
        )
    if config.lora_config is not None and PageOptions.of(config.additional_config).kv_store:
        yield (
            "kv_store finds pages in later runs, where an adapter of the same name may have other "
            "weights: drop kv_store or enable_lora; kv_host_memory serves both"
        )
    if config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events:
        yield "KV events name blocks of vLLM's: drop kv_events_config"
    if model.enable_sleep_mode:
        yield "sleep mode frees memory that holds pages: drop enable_sleep_mode"
    if model.runner_type != "generate":
        yield f"runner {model.runner_type!r}: pages are for generation; use runner='generate'"
    if model.is_encoder_decoder or model.is_multimodal_model:
        yield "pages hold the K and V of text alone: take a text model"
    if cache.cache_dtype not in ("auto", "bfloat16", "float16"):
        yield (
            f"kv_cache_dtype {cache.cache_dtype!r}: a page format has bits of its own; leave it "
            "at auto and choose kv_format, or give bfloat16 if the checkpoint sets it"
        )
    if model.using_transformers_backend():
        yield (
            f"vLLM has no model of its own for {', '.join(model.architectures)} and runs that of "
            "transformers, in which pages do not find the attention layers: take a model of "
            "another family, or LLM of this package"
        )
    if model.enable_prompt_embeds:
        yield (
            "prompts given as embeddings have no token ids, by which pages are found again: drop "
            "enable_prompt_embeds"
        )
    if scheduler.watermark:
        yield "watermark counts free blocks of vLLM's: drop it; prompts wait until they fit"
    if not config.use_v2_model_runner:
        yield (
            "model runner V1 has no seam for pages: set VLLM_USE_V2_MODEL_RUNNER=1 and drop "
            "what it refuses"
        )
    if not scheduler.async_scheduling:
        yield "synchronous scheduling: drop --no-async-scheduling"
    if not _is(scheduler.scheduler_cls, SCHEDULER) or not _is(parallel.worker_cls, WORKER):
        yield (
            f"pages need both scheduler_cls {SCHEDULER} and worker_cls {WORKER}: take the "
            "arguments of engine_args, or the flags of `spectral-paged vllm-args`"
        )
    rows = cache.num_gpu_blocks_override
    if rows is None or rows < scheduler.max_num_seqs + SPARE_ROWS:
        yield (
            f"num_gpu_blocks_override {rows} for max_num_seqs {scheduler.max_num_seqs}: give "
            f"max_num_seqs + {SPARE_ROWS}, as engine_args does"
        )


def _is(given: Any, name: str) -> bool:
    """True if `given`, a class or the name of one as vLLM takes both, is the class `name`."""
    return name == (
        f"{given.__module__}.{given.__qualname__}" if isinstance(given, type) else given
    )


def check_limits(config: Any) -> None:
    """Refuse a `VllmConfig` that asks for what pages do not serve.

    Raises:
        InvalidRequestError: the message names every such option and the remedy.
    """
    found = list(obstacles(config))
    if found:
        raise InvalidRequestError("pages inside vLLM do not serve this: " + "; ".join(found))
