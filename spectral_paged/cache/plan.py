"""The plan of a step lists its sequences and tokens; the report lists failed sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from spectral_paged.errors import NonFiniteError


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """`num_new` tokens of one sequence, the first of them at position `start`."""

    seq_id: str
    start: int
    num_new: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The tokens that one step computes, in the order in which q, k and v are flattened."""

    entries: tuple[PlanEntry, ...]

    @property
    def num_tokens(self) -> int:
        return sum(e.num_new for e in self.entries)

    @property
    def is_decode(self) -> bool:
        """True if every sequence has one new token."""
        return all(e.num_new == 1 for e in self.entries)


@dataclass(slots=True)
class StepReport:
    """The result of `end_step`: sequences in `failed` have NaN or Inf, and are to be freed."""

    failed: dict[str, NonFiniteError] = field(default_factory=dict)
