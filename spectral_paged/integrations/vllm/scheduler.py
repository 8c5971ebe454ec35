"""vLLM's scheduler, with chunks that end where the cache says and requests that fail alone."""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from spectral_paged.integrations.vllm.limits import check_limits
from spectral_paged.integrations.vllm.manager import SpectralKVCacheManager
from spectral_paged.integrations.vllm.options import PageOptions
from spectral_paged.integrations.vllm.releases import check_release
from spectral_paged.integrations.vllm.runtime import PagedRuntime

logger = logging.getLogger("vllm.spectral_paged")

check_release()


ADMISSIBLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class SpectralScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler over pages; policies, priorities and budgets stay vLLM's.

    With a store below the pages, a waiting request is passed over, as vLLM passes over one whose K
    and V a connector fetches, until its prefix is there. No step waits for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_limits(self.vllm_config)
        self._runtime = PagedRuntime.get()
        self._runtime.serving = True
        self._keeps = PageOptions.of(self.vllm_config.additional_config).keeps
        self._asks = False  # for prefixes, of the requests that a step looks at
        self._has_room = True
        SpectralKVCacheManager.adopt(self.kv_cache_manager)
        # vLLM asks this hook, made for Mamba layers, where a request's chunk may end
        self.need_mamba_block_aligned_split = True

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._asks, self._has_room = self._keeps, True
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self._asks = False

    def _is_blocked_waiting_status(self, status: RequestStatus) -> bool:
        """True for requests that `_try_promote_blocked_waiting_request` is to be asked about."""
        blocked = AsyncScheduler._is_blocked_waiting_status(status)
        return bool(blocked or (self._asks and status in ADMISSIBLE))

    def _try_promote_blocked_waiting_request(self, request: Request) -> bool:
        """True if a request may be admitted; where one has no room to load its prefix, none behind
        it may, because they would take the room."""
        if request.status not in ADMISSIBLE:
            if not super()._try_promote_blocked_waiting_request(request):
                return False
            if not self._asks:
                return True
        if not self._has_room:
            return False
        ready = self.kv_cache_manager.prefetch(request)
        self._has_room = ready is not None
        return bool(ready)

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, *_: int, **__: int
    ) -> int:
        """Return the tokens that queries of one view may compute; 0: not in this step."""
        seq_id = request.request_id
        if seq_id in self._runtime.failed:
            return 0  # until its error is given out
        if num_new_tokens == 1 or seq_id not in self._runtime.cache:
            return num_new_tokens  # `allocate_slots` says "not now" of unknown ones
        return min(num_new_tokens, self._runtime.cache.chunk_limit(seq_id))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """End requests whose blocks had NaN or Inf with an error; the others go on."""
        for seq_id, error in self._runtime.take_failed().items():
            if seq_id in self.requests:
                logger.error("request %s failed: %s", seq_id, error)
                self.grammar_compile_error_reqs.add(seq_id)
        return super().update_from_output(scheduler_output, model_runner_output)
