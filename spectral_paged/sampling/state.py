"""All that sampling keeps on the device for the requests that run."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from spectral_paged.sampling.params import SamplingParams
from spectral_paged.sampling.penalties import Penalties
from spectral_paged.sampling.token_rules import TokenRules


@dataclass(frozen=True, slots=True)
class SamplingState:
    """The tables of requests whose parameters depend on more than the newest logits.

    Attributes:
        penalties: tokens of requests with penalties.
        token_rules: rules of requests with a bias, allowed tokens or bad words.
    """

    penalties: Penalties = field(default_factory=Penalties)
    token_rules: TokenRules = field(default_factory=TokenRules)

    def stats(self) -> dict[str, object]:
        """Rows and bytes of the tables."""
        return self.penalties.stats() | self.token_rules.stats()

    def hold(
        self,
        key: Hashable,
        params: SamplingParams,
        logits: Tensor,
        *,
        prompt: Sequence[int],
        output: Sequence[int],
        bad_words: Sequence[Sequence[int]] = (),
        siblings: Iterable[Hashable] = (),
    ) -> tuple[int, int]:
        """Return the rows of `key` in `penalties` and in `token_rules`, -1 where it needs none.

        Args:
            prompt, output: tokens of a new row.
            siblings: keys with the same prompt and parameters.
        """
        penalty_row = rule_row = -1
        if params.has_penalties:
            seen = prompt if params.repetition_penalty != 1.0 else ()
            penalty_row = self.penalties.hold(key, seen, output, logits, siblings=siblings)
        if params.has_token_rules:
            rule_row = self.token_rules.hold(
                key, params, bad_words, output, logits, siblings=siblings
            )
        return penalty_row, rule_row

    def release(self, key: Hashable) -> None:
        """Free the rows of `key`."""
        self.penalties.release(key)
        self.token_rules.release(key)
