"""The engine runs in a thread of its own, and makes the event loop's calls between steps.

Decision 0028 has the alternatives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from spectral_paged.engine import TextDeltas
from spectral_paged.errors import SpectralPagedError
from spectral_paged.llm import LLM
from spectral_paged.options import LoRARequest
from spectral_paged.outputs import RequestOutput
from spectral_paged.sampling import SamplingParams
from spectral_paged.server.api_error import (
    ApiError,
    asleep,
    failed,
    internal,
    log_fault,
    refused,
    stopping,
)
from spectral_paged.server.pending import Generation, News

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
MAX_FAILED_STEPS = 3  # in a row; a step that raised can be taken again
PROBE_SECONDS = 5.0  # between a step that raised and a probe, if no request arrives
PROBE_ID = "probe"  # the ids of requests are longer


class EngineThread:
    """Runs steps while there are requests and sends their outputs to the event loop.

    No other thread may use the LLM meanwhile.

    Attributes:
        died: True after an error ended the thread.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._generations: dict[str, Generation] = {}  # by request id; the thread's own
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # no call is queued after the last ones were taken
        self._stopped = False
        self.died = False
        self._failed_steps = 0
        self._failure: str | None = None  # the reference of the last step's exception in the log
        self._probe_time = 0.0  # monotonic; only where there is a failure

    # ---- the event loop ------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, which sends results to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Abort running requests with a 503, and let the thread end."""
        with self._lock:
            self._stopped = True
        self._calls.put(lambda: None)  # wakes the thread

    async def stop(self) -> None:
        """Abort running requests with a 503, and wait until the thread has ended."""
        self.ask_to_stop()
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    @property
    def problem(self) -> str | None:
        """The reason why requests get no response, or None.

        Steps that raise are a problem until a step returns an output without an error, of a client
        or of a probe.
        """
        failure = self._failure  # read once, because the thread may reset it
        if failure is not None:
            return f"engine steps raise: the log has the exception as reference {failure}"
        if self._loop is not None and not self._thread.is_alive():
            return "the engine's thread has ended"
        return None

    async def submit(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        streams: bool = False,
        lora_request: LoRARequest | None = None,
    ) -> Generation:
        """Queue all prompts (token ids), or none of them.

        Raises:
            ApiError: 400, a prompt can never be served; 5xx, nothing can be.
        """
        loop = asyncio.get_running_loop()
        admitted: asyncio.Future[None] = loop.create_future()
        ids = [f"{request_id}-{place}" for place in range(len(prompts))]
        generation = Generation(
            ids,
            TextDeltas(self.llm.engine) if streams else None,
            lambda: self._calls.put(lambda: self._abort(ids)),
        )

        def report(error: BaseException | None) -> None:
            if not admitted.done():  # it is done if the client has disconnected
                admitted.set_result(None) if error is None else admitted.set_exception(error)

        def add() -> None:
            error: BaseException | None = None
            try:
                self._add(generation, ids, prompts, params, cache_salt, lora_request)
            except SpectralPagedError as refusal:
                error = refused(refusal)
            except ApiError as stop:
                error = stop
            except Exception as fault:
                error = internal(log_fault(f"request {request_id} could not be queued", fault))
            self._tell(lambda: report(error))
            if error is not None:
                self._abort(ids)  # prompts that were queued before the error, before a step runs

        with self._lock:
            if self._stopped:
                raise stopping()
            self._calls.put(add)
        try:
            await admitted
        except BaseException:  # refused, or the client has disconnected: no prompt continues
            generation.close()
            raise
        return generation

    async def call(self, function: Callable[[], Result]) -> Result:
        """Call a function between two steps, and return or raise what it does."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def tell(finish: Callable[[], None]) -> None:
            self._tell(lambda: None if done.done() else finish())

        def run() -> None:
            try:
                result = function()
            except BaseException as error:
                failure = error  # the name of an except clause ends with it
                tell(lambda: done.set_exception(failure))
                if not isinstance(error, Exception):
                    raise
            else:
                tell(lambda: done.set_result(result))

        with self._lock:
            if self._stopped:
                raise stopping()
            self._calls.put(run)
        return await done

    async def sleep(self, level: int, mode: str) -> None:
        """Run no steps until `wake_up`: see `LLM.sleep`. Requests that come meanwhile wait.

        Raises:
            InvalidRequestError: there is no such level or mode.
        """

        def begin() -> None:
            self.llm.engine.sleep.check_asked(level, mode)
            if mode == "abort":
                self._end_all(asleep)
            self.llm.engine.sleep.begin(level, mode, self._finish)

        await self.call(begin)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Run steps again: see `LLM.wake_up`."""
        await self.call(lambda: self.llm.engine.sleep.end(tags))

    @property
    def is_sleeping(self) -> bool:
        return bool(self.llm.engine.sleep.parts)

    def count_refusal(self, error: SpectralPagedError) -> None:
        """Count a request that was refused before it reached the engine."""
        self._calls.put(lambda: self.llm.engine.counters.count_refusal(error))

    def end_all(self, reason: Callable[[], ApiError]) -> None:
        """Abort every request; their clients get the error `reason()`."""
        self._calls.put(lambda: self._end_all(reason))

    # ---- the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        reason: Callable[[], ApiError] = stopping
        try:
            while not self._stopped:
                self._take_calls(wait=not self._has_work)
                if self._stopped:
                    break
                if self._has_work:
                    self._step()
                elif self.is_sleeping:
                    continue
                elif self._failure is not None and time.monotonic() >= self._probe_time:
                    self._probe()
        except BaseException as error:
            self._failure, self.died = log_fault("the engine's thread ends", error), True
            reason = partial(internal, self._failure)
        with self._lock:
            self._stopped = True
        try:
            self._end_all(reason)
        except Exception:
            logger.exception("what was in work could not be aborted")
        self._generations.clear()
        self._take_calls(wait=False)  # so that requests that wait for admission get an error

    @property
    def _has_work(self) -> bool:
        return self.llm.engine.has_unfinished() and not self.is_sleeping

    def _finish(self) -> None:
        """Run the steps of all requests that are there."""
        while self.llm.engine.has_unfinished() and not self._stopped:
            self._step()

    def _take_calls(self, *, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            if wait:
                # after a step that raised, the wait ends in time for a probe
                self._calls.get(timeout=None if self._failure is None else PROBE_SECONDS)()
            while True:
                self._calls.get_nowait()()

    def _add(
        self,
        generation: Generation,
        ids: Sequence[str],
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        cache_salt: str = "",
        lora_request: LoRARequest | None = None,
    ) -> None:
        if self._stopped:
            raise stopping()
        for request_id, prompt in zip(ids, prompts, strict=True):
            self.llm.engine.add_request(
                request_id, prompt, params, cache_salt=cache_salt, lora_request=lora_request
            )
            self._generations[request_id] = generation

    def _abort(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            if self._generations.pop(request_id, None) is not None:
                self.llm.engine.abort(request_id)

    def _end_all(self, reason: Callable[[], ApiError]) -> None:
        waiting = set(self._generations.values())
        self._tell(lambda: _fail(waiting, reason))  # first, because the engine's abort may raise
        self._abort(list(self._generations))

    def _probe(self) -> None:
        """Queue a request of one token, whose output is dropped.

        A load balancer sends no requests while `/health` reports steps that raise, so only a probe
        shows that steps run again.
        """
        self._probe_time = time.monotonic() + PROBE_SECONDS  # of the next one, if this one fails
        generation = Generation([PROBE_ID], None, lambda: None)
        self._add(generation, [PROBE_ID], [[0]], SamplingParams(max_tokens=1))

    def _step(self) -> None:
        try:
            outputs = self.llm.engine.step()
        except Exception as error:
            self._failed_steps += 1
            what = f"engine step failed, {self._failed_steps} in a row"
            self._failure = log_fault(what, error)
            self._probe_time = time.monotonic() + PROBE_SECONDS
            if self._failed_steps % MAX_FAILED_STEPS == 0:
                self._end_all(partial(internal, self._failure))
            return
        self._failed_steps = 0
        # a queued step may still raise, and a step whose requests fail does not prove recovery
        if any(output.error is None for output in outputs):
            self._failure = None
        self._send(outputs)

    def _send(self, outputs: Sequence[RequestOutput]) -> None:
        mail: list[tuple[Generation, list[News], BaseException | None]] = []
        for output in outputs:
            generation = self._generations.get(output.request_id)
            if generation is None:
                continue
            if output.error is not None:
                mail.append((generation, [], failed(output.error)))
            else:
                mail.append((generation, generation.news_of(output), None))
            if output.finished:
                self._generations.pop(output.request_id, None)
        if mail:
            self._tell(lambda: _deliver(mail))

    def _tell(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has closed, so no client waits
            self._loop.call_soon_threadsafe(call)


def _deliver(mail: Sequence[tuple[Generation, list[News], BaseException | None]]) -> None:
    for generation, news, error in mail:
        if news:
            generation.receive(news)
        if error is not None:
            generation.fail(error)


def _fail(generations: set[Generation], reason: Callable[[], ApiError]) -> None:
    for generation in generations:
        generation.fail(reason())
