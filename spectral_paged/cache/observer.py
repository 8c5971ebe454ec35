"""CacheObserver: what a cache tells those who watch it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from spectral_paged.cache.plan import StepPlan, StepReport


class CacheObserver:
    """Watches one cache inside `with cache.observe(observer):`; a base for what wants to know.

    Each method is called on the thread that drives the cache, and does nothing until it is
    overridden. A replayed CUDA graph stores without telling.
    """

    def added(self, seq_id: str, num_prompt_tokens: int) -> None:
        """A sequence was added, by its name or by `reserve`."""

    def freed(self, seq_id: str) -> None:
        """A sequence was freed."""

    def planned(self, plan: StepPlan) -> None:
        """A step begins: `plan` is what it computes."""

    def storing(self, layer: int, k: Tensor, v: Tensor) -> None:
        """K and V `[T, Hkv, D]` of a step, in plan order, are about to be stored and attended to.

        They are the caller's tensors: what is written into them now is what the cache gets.
        """

    def sealed(self, seq_id: str, block: int, layers: Sequence[int]) -> None:
        """A block of a sequence was made a page in each of these layers; later queries see it."""

    def ended(self, plan: StepPlan, report: StepReport) -> None:
        """The tokens of `plan` are stored, and what was due is sealed."""


class Observers(CacheObserver):
    """Those who watch a cache now; each is told in the order in which they came."""

    def __init__(self) -> None:
        self._watching: list[CacheObserver] = []

    @contextmanager
    def joined(self, observer: CacheObserver) -> Iterator[None]:
        """Tell `observer` too while the inside runs."""
        self._watching.append(observer)
        try:
            yield
        finally:
            self._watching.remove(observer)

    def added(self, seq_id: str, num_prompt_tokens: int) -> None:
        for one in self._watching:
            one.added(seq_id, num_prompt_tokens)

    def freed(self, seq_id: str) -> None:
        for one in self._watching:
            one.freed(seq_id)

    def planned(self, plan: StepPlan) -> None:
        for one in self._watching:
            one.planned(plan)

    def storing(self, layer: int, k: Tensor, v: Tensor) -> None:
        for one in self._watching:
            one.storing(layer, k, v)

    def sealed(self, seq_id: str, block: int, layers: Sequence[int]) -> None:
        for one in self._watching:
            one.sealed(seq_id, block, layers)

    def ended(self, plan: StepPlan, report: StepReport) -> None:
        for one in self._watching:
            one.ended(plan, report)
