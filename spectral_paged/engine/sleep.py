"""An engine sleeps: it runs no steps, and other programs have its memory meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from spectral_paged.cache import SpectralKVCache, give_memory_back, take_memory_again
from spectral_paged.engine.request_table import RequestTable
from spectral_paged.errors import InvalidRequestError, RequestFailedError, SpectralPagedError, shown

logger = logging.getLogger(__name__)

PARTS = ("weights", "kv_cache", "scheduling")  # vLLM's tags
MODES = ("abort", "wait", "keep")


class Sleeper(Protocol):
    """Runs a model whose weights can be put aside."""

    def sleep(self) -> None: ...
    def wake_up(self) -> None: ...


class Sleep:
    """The sleep of an engine; levels, modes and tags are vLLM's.

    ```
    level 0    no steps are run
    level 1    weights are in host memory too, and the memory of pages is free
    ```

    Attributes:
        parts: those of `PARTS` that sleep now; none: the engine is awake.
    """

    def __init__(self, runner: Sleeper, cache: SpectralKVCache, requests: RequestTable) -> None:
        self._runner, self._cache, self._requests = runner, cache, requests
        self.parts: set[str] = set()

    def check(self) -> None:
        """Raise while the engine sleeps.

        Raises:
            SpectralPagedError: says how it is woken.
        """
        if self.parts:
            tags = ", ".join(part for part in PARTS if part in self.parts)
            raise SpectralPagedError(f"this LLM sleeps ({tags}): call its wake_up() first")

    def begin(self, level: int, mode: str, finish: Callable[[], None]) -> None:
        """Fall asleep. An engine that sleeps may sleep deeper; again as deep changes nothing.

        Args:
            mode: what becomes of requests and beam searches that are not finished: `abort` fails
                them, `wait` runs them to their end, `keep` keeps them until the engine wakes
                (level 0).
            finish: runs steps until no request is left.

        Raises:
            InvalidRequestError: there is no such level or mode, or not together; another LLM runs
                the same model.
            PoolError: sequences of a caller of the cache itself are in it.
        """
        self.check_asked(level, mode)
        if self.parts - {"scheduling"} or (level == 0 and self.parts):
            return
        self.parts.clear()
        if mode == "abort":
            self._fail_all()
        if mode != "keep":
            self._finish_searches()
            finish()
        if level == 0:
            self.parts = {"scheduling"}
            return
        try:
            self._runner.sleep()
            self.parts.add("weights")
            give_memory_back(self._cache)
            self.parts.add("kv_cache")
        except BaseException:  # awake, or asleep: nothing between
            self.end()
            raise
        logger.info("asleep: %.2f GiB of pages are free", self._cache.num_bytes / 2**30)

    def end(self, tags: Sequence[str] | None = None) -> None:
        """Wake up, or only what `tags` name; steps run again when nothing sleeps any more.

        After an error, such as memory that others have now, it may be called again.

        Raises:
            InvalidRequestError: there is no such tag.
        """
        wanted = PARTS if tags is None else tuple(tags)
        if unknown := [tag for tag in wanted if tag not in PARTS]:
            raise InvalidRequestError(
                f"tag {shown(unknown[0])} is none of {', '.join(PARTS)}: name some, or none for all"
            )
        for part, wake in (
            ("weights", self._runner.wake_up),
            ("kv_cache", lambda: take_memory_again(self._cache)),
            ("scheduling", lambda: None),
        ):
            if part in wanted and part in self.parts:
                wake()
                self.parts.discard(part)

    def _fail_all(self) -> None:
        for group in list(self._requests.by_id.values()):
            error = _aborted(f"request {shown(group.request_id)}")
            for completion in group.completions:
                self._requests.fail(completion, error)
        for search in list(self._requests.searches):
            search.fail(_aborted("a beam search"))

    def _finish_searches(self) -> None:
        """Run beam searches to their ends; their callers get what they raise."""
        for search in list(self._requests.searches):
            try:
                while not search.finished:
                    search.step()
            except SpectralPagedError as error:
                search.fail(error)

    @staticmethod
    def check_asked(level: object, mode: object) -> None:
        """Raise InvalidRequestError unless there is such a sleep."""
        _check(level, mode)


def _aborted(what: str) -> RequestFailedError:
    return RequestFailedError(f"{what} was aborted, because the LLM falls asleep")


def _check(level: object, mode: object) -> None:
    if level == 2 and not isinstance(level, bool):
        raise InvalidRequestError(
            "level 2 drops the weights, and no others can be put in their place here: take level "
            "1, which keeps them in host memory, or close the LLM"
        )
    if level not in (0, 1) or isinstance(level, bool):
        raise InvalidRequestError(f"level is {shown(level)}; it must be 0 or 1")
    if mode not in MODES:
        raise InvalidRequestError(f"mode is {shown(mode)}; it must be one of {', '.join(MODES)}")
    if level and mode == "keep":
        raise InvalidRequestError(
            "mode 'keep' keeps the pages of requests, and level 1 frees their memory: take 'wait' "
            "or 'abort', or level 0"
        )
