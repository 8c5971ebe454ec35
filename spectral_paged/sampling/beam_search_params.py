"""The parameters of a beam search, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from spectral_paged.errors import SamplingParamsError, shown
from spectral_paged.sampling.plain_values import plain

MAX_WIDTH = 256


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """The parameters of `LLM.beam_search`; names and meaning are vLLM's.

    Args:
        beam_width: number of sequences that go on in each step, and that are returned.
        max_tokens: most tokens that a sequence gets.
        ignore_eos: end tokens end no sequence.
        temperature: 0, because scores are sums of log-probabilities of raw logits.
        length_penalty: a score is the sum over the length of prompt and output to this power.

    Raises:
        SamplingParamsError: a value outside its range; names the value and the range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("beam_width", MAX_WIDTH), ("max_tokens", None)):
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < 1 or (most is not None and value > most):
                limit = ">= 1" if most is None else f"between 1 and {most}"
                raise _refused(name, value, f"an integer {limit}")
        if not isinstance(self.ignore_eos, bool):
            raise _refused("ignore_eos", self.ignore_eos, "True or False")
        if self.temperature != 0:
            raise _refused("temperature", self.temperature, "0 in a beam search")
        if not isinstance(self.length_penalty, int | float) or abs(self.length_penalty) > 100:
            raise _refused("length_penalty", self.length_penalty, "a number in [-100, 100]")


def _refused(name: str, value: object, text: str) -> SamplingParamsError:
    error = SamplingParamsError(f"{name} is {shown(value)}; it must be {text}")
    error.param = name
    return error
