"""vLLM's block manager hands rows out itself, and asks the cache for everything else."""

from __future__ import annotations

import logging
from itertools import compress
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from spectral_paged.integrations.vllm.runtime import PagedRuntime, timed

logger = logging.getLogger("vllm.spectral_paged")


class SpectralKVCacheManager(KVCacheManager):
    """vLLM's `KVCacheManager` over `SpectralKVCache`.

    An object of vLLM's becomes one by `adopt`, because vLLM makes it inside its scheduler.

    A request has a sequence in the cache from its look-up in the prefix cache on, and a row from
    its first allocation on. A request that was looked up and not admitted loses its sequence again
    with the next look-up.
    """

    _runtime: PagedRuntime
    _prompts: dict[str, int]  # admitted requests, and the tokens that they will have prefilled
    _candidate: str | None  # looked up and not admitted
    _admitted: dict[str, None]  # in order
    _quiet: set[str]  # admitted, and one more token of them needs no reservation in this step

    @classmethod
    def adopt(cls, manager: KVCacheManager) -> SpectralKVCacheManager:
        """Turn vLLM's manager, made by its own constructor, into one over this process's cache."""
        manager.__class__ = cls
        manager._runtime, manager._prompts = PagedRuntime.get(), {}
        manager._candidate = None
        manager._admitted, manager._quiet = {}, set()
        return manager

    @property
    def usage(self) -> float:
        return self._runtime.cache.usage

    @timed
    def new_step_starts(self) -> None:
        # structured outputs sample after the next step is scheduled, so the step may be open still
        self._runtime.settle()
        seq_ids = list(self._admitted)
        _, quiet = self._runtime.cache.progress(seq_ids)
        self._quiet = set(compress(seq_ids, quiet))
        super().new_step_starts()

    @timed
    def prefetch(self, request: Request) -> bool | None:
        """Bring a request's prefix from below the pages; True: it is there, or nothing comes.

        False: on its way. None: no room now.
        """
        cache, seq_id = self._runtime.cache, request.request_id
        self._free_candidate()
        if request.skip_reading_prefix_cache or seq_id in cache:
            return True
        return cache.prefetch(
            seq_id,
            num_prompt_tokens=request.num_prompt_tokens,
            token_ids=request._all_token_ids,
            cache_salt=_salt(request),
        )

    @timed
    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """Add the request's sequence; its hit is in tokens, and needs no blocks."""
        cache, seq_id = self._runtime.cache, request.request_id
        self._free_candidate()
        found = cache.add_sequence(
            seq_id,
            num_prompt_tokens=request.num_prompt_tokens,
            token_ids=request._all_token_ids,  # the list that vLLM appends to
            cache_salt=_salt(request),
            resumed=request.num_preemptions > 0,
        )
        if found is None:
            return self.empty_kv_cache_blocks, 0, 0  # `allocate_slots` will say "not now"
        self._candidate = seq_id
        if self.log_stats:
            self.prefix_cache_stats.record(
                num_tokens=request.num_tokens,
                num_hits=found,
                preempted=request.num_preemptions > 0,
            )
        return self.empty_kv_cache_blocks, found, 0

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        *_: Any,
        full_sequence_must_fit: bool = False,
        **__: Any,
    ) -> KVCacheBlocks | None:
        """Reserve the step's tokens; None: vLLM preempts another request, or lets this one wait."""
        if num_new_tokens == 1 and request.request_id in self._quiet:
            return self.empty_kv_cache_blocks
        return self._reserve(request, num_new_tokens, full_sequence_must_fit)

    @timed
    def _reserve(
        self, request: Request, num_new_tokens: int, full_sequence_must_fit: bool
    ) -> KVCacheBlocks | None:
        cache, seq_id = self._runtime.cache, request.request_id
        if seq_id not in cache or seq_id in self._runtime.failed:
            return None
        admitted = seq_id != self._candidate
        if not admitted and full_sequence_must_fit and not self._has_room(request):
            self._free_candidate()
            return None
        if not cache.try_reserve(seq_id, num_new_tokens):
            self._free_candidate()
            return None
        if admitted:
            return self.empty_kv_cache_blocks
        self._candidate = None
        self._admitted[seq_id] = None
        self._prompts[seq_id] = request.num_tokens
        row = self.coordinator.allocate_new_blocks(seq_id, 1, 1, 0)
        return self.create_kv_cache_blocks(row)

    def _has_room(self, request: Request) -> bool:
        """True if the whole request fits beside those that run and what their prompts still need.

        Alone it is let in: a cache is refused in which the longest request does not fit.
        """
        cache = self._runtime.cache
        if cache.num_sequences == 1:
            return True
        self._prompts = {s: n for s, n in self._prompts.items() if cache.num_tokens(s) < n}
        lengths = {**self._prompts, request.request_id: request.num_tokens}
        return cache.has_room(lengths)

    @timed
    def free(self, request: Request) -> None:
        super().free(request)
        seq_id = request.request_id
        self._prompts.pop(seq_id, None)
        self._runtime.cache.cancel_prefetch(seq_id)
        self._admitted.pop(seq_id, None)
        self._quiet.discard(seq_id)
        if seq_id == self._candidate:
            self._candidate = None
        if seq_id in self._runtime.cache:
            self._runtime.cache.free(seq_id)
            self._runtime.note_late_failures()

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Do nothing: the cache publishes slots when a step ends."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> list[int]:
        return [0] * self.num_kv_cache_groups

    def estimate_cached_tokens(self, request: Request) -> int:
        seq_id = request.request_id
        held = seq_id in self._runtime.cache
        return self._runtime.cache.num_tokens(seq_id) if held else 0

    @timed
    def reset_prefix_cache(self) -> bool:
        """Forget every prefix; False, as vLLM's own: requests hold some, which can still be hit."""
        self._runtime.settle()
        self._free_candidate()
        held = self._runtime.cache.num_sequences
        if held:
            logger.warning("the prefix cache is not reset: %d requests hold parts of it", held)
            return False
        self._runtime.cache.reset_prefix_cache()
        if self.log_stats:
            self.prefix_cache_stats.reset = True
        return True

    def _free_candidate(self) -> None:
        if self._candidate is not None:
            self._runtime.cache.free(self._candidate)
            self._candidate = None


def _salt(request: Request) -> str:
    """The salt of a request: vLLM's, and what else keeps K and V of equal tokens apart.

    It is written so that no salt of a client's is that of another request with an adapter.
    """
    lora = request.lora_request
    # one that wants log-probs of its prompt computes all of it, after a preemption too
    alone = (request.request_id, request.num_preemptions)
    parts = (
        request.cache_salt or "",
        lora.lora_name if lora is not None else None,
        alone if request.skip_reading_prefix_cache else None,
    )
    return repr(parts) if any(parts) else ""
