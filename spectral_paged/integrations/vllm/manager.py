"""vLLM's block manager hands rows out itself, and asks the cache for everything else."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from spectral_paged.integrations.vllm.runtime import PagedRuntime, timed


class SpectralKVCacheManager(KVCacheManager):
    """vLLM's `KVCacheManager` over `SpectralKVCache`.

    An object of vLLM's becomes one by `adopt`, because vLLM makes it inside its scheduler.

    A request has a sequence in the cache from its look-up in the prefix cache on, and a row from
    its first allocation on. A request that was looked up and not admitted loses its sequence again
    with the next look-up.
    """

    _runtime: PagedRuntime
    _prompts: dict[str, int]  # admitted requests, and the tokens that they will have prefilled

    @classmethod
    def adopt(cls, manager: KVCacheManager) -> SpectralKVCacheManager:
        """Turn vLLM's manager, made by its own constructor, into one over this process's cache."""
        manager.__class__ = cls
        manager._runtime, manager._prompts = PagedRuntime.get(), {}
        return manager

    @property
    def usage(self) -> float:
        return self._runtime.cache.usage

    @timed
    def new_step_starts(self) -> None:
        # structured outputs sample after the next step is scheduled, so the step may be open still
        self._runtime.settle()
        super().new_step_starts()

    @timed
    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """Add the request's sequence; its hit is in tokens, and needs no blocks."""
        cache, seq_id = self._runtime.cache, request.request_id
        if seq_id in cache:  # looked up before and not admitted
            cache.free(seq_id)
        found = cache.add_sequence(
            seq_id,
            num_prompt_tokens=request.num_prompt_tokens,
            token_ids=request._all_token_ids,  # the list that vLLM appends to
            cache_salt=_salt(request),
            resumed=request.num_preemptions > 0,
        )
        if found is None:
            return self.empty_kv_cache_blocks, 0, 0  # `allocate_slots` will say "not now"
        if self.log_stats:
            self.prefix_cache_stats.record(
                num_tokens=request.num_tokens,
                num_hits=found,
                preempted=request.num_preemptions > 0,
            )
        return self.empty_kv_cache_blocks, found, 0

    @timed
    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        *_: Any,
        full_sequence_must_fit: bool = False,
        **__: Any,
    ) -> KVCacheBlocks | None:
        """Reserve the step's tokens; None: vLLM preempts another request, or lets this one wait."""
        cache, seq_id = self._runtime.cache, request.request_id
        if seq_id not in cache:
            return None
        admitted = bool(self.coordinator.get_blocks(seq_id)[0])
        if not admitted and full_sequence_must_fit and not self._has_room(request):
            cache.free(seq_id)
            return None
        if not cache.try_reserve(seq_id, num_new_tokens):
            if not admitted:
                cache.free(seq_id)
            return None
        if admitted:
            return self.empty_kv_cache_blocks
        self._prompts[seq_id] = request.num_tokens
        row = self.coordinator.allocate_new_blocks(seq_id, 1, 1, 0)
        return self.create_kv_cache_blocks(row)

    def _has_room(self, request: Request) -> bool:
        """True if the whole request fits beside those that run and what their prompts still need.

        With nothing admitted it is let in, so that a large request can wait for cached slots.
        """
        cache = self._runtime.cache
        self._prompts = {s: n for s, n in self._prompts.items() if cache.num_tokens(s) < n}
        lengths = {**self._prompts, request.request_id: request.num_tokens}
        return cache.has_room(lengths)

    @timed
    def free(self, request: Request) -> None:
        super().free(request)
        seq_id = request.request_id
        self._prompts.pop(seq_id, None)
        if seq_id in self._runtime.cache:
            self._runtime.cache.free(seq_id)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Do nothing: the cache publishes slots when a step ends."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> list[int]:
        return [0] * self.num_kv_cache_groups

    def estimate_cached_tokens(self, request: Request) -> int:
        seq_id = request.request_id
        held = seq_id in self._runtime.cache
        return self._runtime.cache.num_tokens(seq_id) if held else 0

    def reset_prefix_cache(self) -> bool:
        self._runtime.settle()
        self._runtime.cache.reset_prefix_cache()
        if self.log_stats:
            self.prefix_cache_stats.reset = True
        return True


def _salt(request: Request) -> str:
    """The salt of a request: vLLM's, and what else keeps K and V of equal tokens apart."""
    salt = request.cache_salt or ""
    if request.lora_request is not None:
        salt += f"/lora {request.lora_request.lora_name}"
    if request.skip_reading_prefix_cache:  # it wants log-probs of its prompt
        salt += f"/alone {request.request_id}"
    return salt
