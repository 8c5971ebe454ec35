"""A cache observer's methods are called at the events of one cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from spectral_paged.cache.plan import StepPlan, StepReport


class CacheObserver:
    """A base class of observers, active inside `with cache.observe(observer):`.

    Each method is called on the thread that drives the cache, and does nothing until it is
    overridden. A replayed CUDA graph stores K and V without calling `storing`.
    """

    def added(self, seq_id: str, num_prompt_tokens: int) -> None:
        """A sequence was added, by `add_sequence` or by `reserve`."""

    def freed(self, seq_id: str) -> None:
        """A sequence was freed."""

    def planned(self, plan: StepPlan) -> None:
        """A step with this plan begins."""

    def storing(self, layer: int, k: Tensor, v: Tensor) -> None:
        """K and V `[T, Hkv, D]` of a step, in plan order, are about to be stored and attended to.

        They are the caller's tensors, so values written into them now reach the cache.
        """

    def sealed(self, seq_id: str, block: int, layers: Sequence[int]) -> None:
        """A block of a sequence became a page in each of these layers, for later queries."""

    def ended(self, plan: StepPlan, report: StepReport) -> None:
        """The tokens of `plan` are stored, and due blocks are sealed."""


class Observers(CacheObserver):
    """The observers of a cache, each called in the order in which they joined."""

    def __init__(self) -> None:
        self._watching: list[CacheObserver] = []

    @contextmanager
    def joined(self, observer: CacheObserver) -> Iterator[None]:
        """Call `observer` as well while the `with` block runs."""
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
