"""Typed errors, whose messages state the fault, the value, the limit and the remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

MAX_SHOWN = 200  # characters of one value in a message


class SpectralPagedError(Exception):
    """The base of every error that this package raises on purpose.

    Attributes:
        request_id: the id of the request that the error belongs to, if any.
        outputs: set by `LLM.generate`: the outputs of every request of the call, in prompt
            order (`None` where a prompt was refused), so that no finished output is lost.
        param: the field of the request that is at fault, if any.
    """

    request_id: str | None = None
    param: str | None = None
    outputs: list[Any] | None = None


class InvalidRequestError(SpectralPagedError, ValueError):
    """A prompt that cannot be served: empty, not token ids, unknown option."""


class EmptyPromptError(InvalidRequestError):
    """A prompt without tokens."""


class PromptTooLongError(InvalidRequestError):
    """A prompt longer than `max_model_len` allows."""


class CapacityError(InvalidRequestError):
    """A request that can never fit the pool, even without other requests."""


class AdapterError(InvalidRequestError):
    """A LoRA adapter that is unknown, damaged or not served, or for which there is no room."""


class SamplingParamsError(SpectralPagedError, ValueError):
    """A sampling value outside its range."""


class RequestFailedError(SpectralPagedError, RuntimeError):
    """A valid request that failed while it ran.

    Memory ran out even for a step of one token, or preparing it, sampling or decoding its text
    raised.
    `__cause__` is the exception.
    """


class UnknownModelError(SpectralPagedError, ValueError):
    """A model name that is no alias, no folder, no `.gguf` file and no loadable hub id."""


class UnsupportedModelError(SpectralPagedError, ValueError):
    """A model whose architecture, RoPE or attention this version does not serve."""


class CorruptFileError(SpectralPagedError, ValueError):
    """A model, basis or data file that is truncated, too large or of another type than expected."""


class MissingPackageError(SpectralPagedError, ImportError):
    """An option that needs a package outside the base install."""


class FormatError(SpectralPagedError, ValueError):
    """A `PageFormat` (or preset name) that is unknown or breaks the kernel contract."""


class NonFiniteError(SpectralPagedError, ArithmeticError):
    """NaN or Inf in K or V (or logits): the model's output cannot be cached."""

    def __init__(self, message: str, *, block_index: int = -1) -> None:
        super().__init__(message)
        self.block_index = block_index


class ConformanceError(SpectralPagedError, AssertionError):
    """A serving loop that breaks a rule of embedding the cache; see `docs/embedding.md`."""


class ClusterError(SpectralPagedError, RuntimeError):
    """A cluster that did not finish its part of a batch. Finished records are kept."""


class PatchError(SpectralPagedError, RuntimeError):
    """A third-party function that cannot be replaced or restored at every place that uses it."""


class PoolError(SpectralPagedError, RuntimeError):
    """A broken bookkeeping rule: double free, use after free, lost slot. Always a bug."""


def missing_extra(what: str, extra: str) -> MissingPackageError:
    """Return the error of `what`, which needs packages that an extra of the project installs."""
    return MissingPackageError(f"{what}: pip install '.[{extra}]' in the project's folder")


class _Brief(reprlib.Repr):
    """A `repr` that reads the beginning and the end of long values only."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 8
        self.maxstring = 120
        self.maxother = MAX_SHOWN

    def repr_int(self, x: int, level: int) -> str:
        # Python writes no integer of more than 4,300 digits
        return repr(x) if x.bit_length() <= 512 else f"an integer of {x.bit_length()} bits"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Like that of the base class, but for the order, because sorting reads all keys."""
        if level <= 0 and x:
            return "{...}"
        first = [
            f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}"
            for key in islice(x, self.maxdict)
        ]
        return "{" + ", ".join(first + ["..."] * (len(x) > self.maxdict)) + "}"


_BRIEF = _Brief()


def cut(text: str, most: int = MAX_SHOWN) -> str:
    """Return a text of unknown length for an error message: at most `most` characters of it."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: object) -> str:
    """Return the `repr` of a caller's value for an error message, on one line and cut.

    Every message that echoes what a caller gave uses this or `cut`, because a message is logged,
    stored and sent back, and the value may have megabytes.
    """
    text = _BRIEF.repr(value)
    return cut(" ".join(text.split()) if "\n" in text else text)


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return a question for the one of `known` that `name` is most like; "" if none is like it."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {shown(near[0])}?" if near else ""


def refusal(message: str, param: str) -> InvalidRequestError:
    """Return the error of a request whose field `param` is at fault."""
    error = InvalidRequestError(message)
    error.param = cut(param)
    return error


def attach_outputs(error: BaseException, outputs: Sequence[Any], what: str) -> None:
    """Set `error.outputs` to `outputs`, in prompt order, and note how many of them finished."""
    error.outputs = list(outputs)  # type: ignore[attr-defined]
    done = sum(output is not None and output.error is None for output in outputs)
    error.add_note(f"{what}, {done} finished: their outputs are in error.outputs")
