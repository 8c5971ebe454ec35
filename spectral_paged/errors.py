"""Typed errors. Each message says what was wrong, the value, the limit, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SpectralPagedError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        request_id: the request it belongs to, where there is one.
        outputs: set by `LLM.generate`: the outputs of every request of the call, in prompt
            order (`None` where a prompt was refused), so that nothing finished is lost.
        param: the field of the request that is at fault, where one is.
    """

    request_id: str | None = None
    param: str | None = None
    outputs: list[Any] | None = None


class InvalidRequestError(SpectralPagedError, ValueError):
    """A prompt that cannot be served: empty, not token ids, unknown option."""


class EmptyPromptError(InvalidRequestError):
    """A prompt without a single token."""


class PromptTooLongError(InvalidRequestError):
    """A prompt longer than `max_model_len` allows."""


class CapacityError(InvalidRequestError):
    """A request that can never fit the pool, even alone."""


class SamplingParamsError(SpectralPagedError, ValueError):
    """A sampling value outside its range."""


class RequestFailedError(SpectralPagedError, RuntimeError):
    """A request that failed while it ran by no fault of its own: memory ran out even for a step of
    one token, or its sampling or the text of its output raised; `__cause__` is what did."""


class UnknownModelError(SpectralPagedError, ValueError):
    """A model name that is no alias, no folder, no `.gguf` file and no loadable hub id."""


class UnsupportedModelError(SpectralPagedError, ValueError):
    """A model whose architecture, RoPE or attention this version does not serve."""


class CorruptFileError(SpectralPagedError, ValueError):
    """A model, basis or data file that is truncated or is not what its name says."""


class MissingPackageError(SpectralPagedError, ImportError):
    """An option that needs a package which the base install does not bring."""


class FormatError(SpectralPagedError, ValueError):
    """A `PageFormat` (or preset name) that is unknown or breaks the kernel contract."""


class NonFiniteError(SpectralPagedError, ArithmeticError):
    """NaN or Inf in K or V (or logits): the model's output cannot be cached."""

    def __init__(self, message: str, *, block_index: int = -1) -> None:
        super().__init__(message)
        self.block_index = block_index


class ConformanceError(SpectralPagedError, AssertionError):
    """A loop around the cache that breaks a rule of embedding it; see `docs/embedding.md`."""


class ClusterError(SpectralPagedError, RuntimeError):
    """A cluster that did not do its part of a batch; what it finished is kept."""


class PatchError(SpectralPagedError, RuntimeError):
    """A function in third-party code that cannot be replaced, or not restored, everywhere."""


class PoolError(SpectralPagedError, RuntimeError):
    """A broken bookkeeping rule: double free, use after free, lost slot. Always a bug."""


def attach_outputs(error: BaseException, outputs: Sequence[Any], what: str) -> None:
    """Let `error.outputs` hold what finished, in prompt order, and a note say so."""
    error.outputs = list(outputs)  # type: ignore[attr-defined]
    done = sum(output is not None and output.error is None for output in outputs)
    error.add_note(f"{what}, {done} finished: their outputs are in error.outputs")
