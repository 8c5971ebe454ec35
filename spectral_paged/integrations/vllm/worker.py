"""vLLM's worker of one GPU, which makes the cache of pages in place of vLLM's blocks."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu_worker import Worker

from spectral_paged.cache import SpectralKVCache
from spectral_paged.errors import CapacityError, UnsupportedModelError
from spectral_paged.integrations.vllm.calibration import layer_calibration
from spectral_paged.integrations.vllm.flash_attention import use_vllm_build
from spectral_paged.integrations.vllm.graphs import SpectralCudaGraphs
from spectral_paged.integrations.vllm.layers import PagedLayers
from spectral_paged.integrations.vllm.limits import check_limits
from spectral_paged.integrations.vllm.model_state import SpectralModelState
from spectral_paged.integrations.vllm.options import PageOptions
from spectral_paged.integrations.vllm.releases import check_release
from spectral_paged.integrations.vllm.rows import RowSpec, row_tokens
from spectral_paged.integrations.vllm.runtime import PagedRuntime
from spectral_paged.models.cache_for_model import model_format
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.weights_digest import weights_digest

logger = logging.getLogger("vllm.spectral_paged")
# what a step with pages needs and vLLM's profile does not see: a chunk's rebuilt history, the
# workspace of a seal, and the tables between the kernels of decode graphs
TRANSIENT_BYTES = 1 << 30

check_release()


class SpectralWorker(Worker):
    """vLLM's GPU worker, with `SpectralKVCache` as its cache.

    ```
    init_device                  what pages do not serve is refused, before weights load
    load_model                   layers are numbered; every layer's spec is a row
    determine_available_memory   the bytes that the arenas get
    initialize_from_config       calibration, cache, rooms for CUDA graphs
    ```
    """

    def init_device(self) -> None:
        check_limits(self.vllm_config)
        self.page_options = PageOptions.of(self.vllm_config.additional_config)
        self.geometry = ModelGeometry.from_config(self.model_config.hf_text_config)
        self.page_format = model_format(
            self.page_options.kv_format,
            self.geometry,
            prefill_segment=self.page_options.prefill_segment,
        )
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if type(runner.model_state) is not DefaultModelState or runner.model_state.rope_state:
            raise UnsupportedModelError(
                f"the model keeps a state of its own ({type(runner.model_state).__name__}) or "
                "rotates by more than one position: take a plain decoder"
            )
        runner.model_state.__class__ = SpectralModelState
        self.layers = PagedLayers.of(runner.get_model(), self.geometry)
        for module in self.layers.modules:
            spec = RowSpec(
                block_size=row_tokens(self.model_config.max_model_len),
                num_kv_heads=module.num_kv_heads,
                head_size=module.head_size,
                dtype=torch.uint8,
            )
            module.get_kv_cache_spec = lambda vllm_config, spec=spec: spec

    def determine_available_memory(self) -> int:
        found = int(super().determine_available_memory())
        given = self.cache_config.kv_cache_memory_bytes
        self.arena_bytes = int(given) if given else found - TRANSIENT_BYTES
        return found

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        start = time.perf_counter()
        runtime = PagedRuntime.current = PagedRuntime(self._make_cache())
        made = time.perf_counter()
        runtime.cache.warm_up()
        logger.info(
            "pages: calibration and cache took %.1f s, kernels of sealing and rebuilding %.1f s",
            made - start,
            time.perf_counter() - made,
        )
        super().initialize_from_config(kv_cache_config)
        SpectralCudaGraphs.adopt(
            self.model_runner.cudagraph_manager, self.model_config.max_model_len
        )

    def _without_adapters(self, num_tokens: int) -> None:
        """Tell layers that take LoRA adapters that the next tokens use none."""
        if self.lora_config is not None:
            longest = self.scheduler_config.max_num_batched_tokens  # that vLLM has places for
            self.model_runner._set_active_loras((0,), (0,) * min(num_tokens, longest), set())

    def _make_cache(self) -> SpectralKVCache:
        """Make the cache that `determine_available_memory` found bytes for, and log its size.

        Raises:
            CapacityError: `max_model_len` tokens do not fit.
        """
        use_vllm_build()
        model, layers = self.model_runner.get_model(), self.layers
        longest = self.model_config.max_model_len
        options, ropes = self.page_options, layers.ropes(self.device, longest)
        cache = SpectralKVCache(
            num_layers=len(layers.modules),
            num_q_heads=layers.num_q_heads,
            num_kv_heads=layers.num_kv_heads,
            head_dim=layers.head_dim,
            rope=ropes,
            format=self.page_format,
            device=self.device,
            dtype=self.model_config.dtype,
            sliding_windows=layers.windows,
            softmax_scale=layers.softmax_scale,
            softcap=layers.softcap,
            kv_cache_bytes=self.arena_bytes,
            disable_cascade_attn=True,  # vLLM captures steps without tiles
            # vLLM may look one more request up than it admits
            max_num_seqs=self.scheduler_config.max_num_seqs + 1,
            max_model_len=longest,
            exempt_layers=options.exempt_layers,
            kv_host_memory=options.kv_host_memory,
            kv_store=options.kv_store,
            kv_store_size=options.kv_store_size,
            model_fingerprint=None if options.kv_store is None else weights_digest(model, ropes),
            calibration=layer_calibration(
                options.calibration,
                self.page_format,
                self.vllm_config,
                model,
                layers,
                self.device,
                self._without_adapters,
            ),
            enable_prefix_caching=bool(self.cache_config.enable_prefix_caching),
        )
        if cache.max_sequence_tokens < longest:
            raise CapacityError(
                f"{self.arena_bytes / 1e9:.1f} GB of pages hold a sequence of at most "
                f"{cache.max_sequence_tokens} tokens, and max_model_len is {longest}: lower "
                "max_model_len, or raise gpu_memory_utilization or kv_cache_memory_bytes"
            )
        capacity = cache.capacity_tokens
        self.cache_config.kv_cache_size_tokens = capacity
        self.cache_config.kv_cache_max_concurrency = capacity / longest
        logger.info(
            "pages of %s (%s): %.1f GB hold %s tokens, %d sequences of %d tokens",
            cache.format.name,
            cache.format.fingerprint,
            cache.num_bytes / 1e9,
            f"{capacity:,}",
            cache.concurrency(longest),
            longest,
        )
        return cache

    def shutdown(self) -> None:
        """Write what the store is to keep, and give its memory back."""
        if PagedRuntime.current is not None:
            PagedRuntime.current.settle()
            PagedRuntime.current.cache.close()
        super().shutdown()

    def page_concurrency(self, num_tokens: int) -> int:
        """Return the number of sequences of `num_tokens` tokens that fit at once."""
        return PagedRuntime.get().cache.concurrency(num_tokens)

    def page_stats(self) -> dict[str, object]:
        """Return the figures of pages: `llm.collective_rpc("page_stats")`."""
        return PagedRuntime.get().stats()
