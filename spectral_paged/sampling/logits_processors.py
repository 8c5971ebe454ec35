"""Functions of a caller change the logits of one request."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_paged.errors import InvalidRequestError, shown

LogitsProcessor = Callable[..., Tensor]
"""Changes the logits of a request's next token.

It is called as `f(output_token_ids, logits)`, or as `f(prompt_token_ids, output_token_ids, logits)`
if it has three parameters without a default. The ids are copies of all tokens so far.
`logits` is fp32 `[vocab]` on the model's device, a copy that may be changed in place. It returns a
tensor of that shape, in which -inf rules a token out. It may be called again for the same token,
where a step is taken again. What it raises fails its request, and no other one.
"""

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def process(
    processors: Sequence[LogitsProcessor],
    prompt: Sequence[int],
    output: Sequence[int],
    logits: Tensor,
) -> Tensor:
    """Return the logits of one row, `[vocab]`, as the processors leave them.

    Raises:
        InvalidRequestError: a processor returns something else.
    """
    for processor in processors:
        tokens = (prompt, output) if _num_arguments(processor) == 3 else (output,)
        found: Any = processor(*(list(ids) for ids in tokens), logits)
        if not isinstance(found, Tensor) or found.shape != logits.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else found
            raise InvalidRequestError(
                f"logits processor {shown(processor)} returned {shown(what)}; it must return a "
                f"tensor of shape {tuple(logits.shape)}"
            )
        logits = found.to(logits.device, torch.float32)
    return logits


def _num_arguments(processor: LogitsProcessor) -> int:
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # of a function that is not Python's
        return 2
    # one that has a default is not of the contract
    return sum(p.kind in _BY_PLACE and p.default is p.empty for p in parameters)
