"""The engine refuses requests that the cache or the model can never serve."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_paged.cache import Spans, SpectralKVCache, pinned_blocks
from spectral_paged.errors import (
    CapacityError,
    EmptyPromptError,
    PoolError,
    PromptTooLongError,
    refusal,
    shown,
)
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.sampling import SamplingParams
from spectral_paged.scheduler import Scheduler

MAX_LOGPROBS = 20


def check_request(
    cache: SpectralKVCache,
    token_ids: Sequence[int],
    params: SamplingParams,
    pinned: Spans,
    vocab_size: int | None,
    max_logprobs: int = MAX_LOGPROBS,
) -> None:
    """Refuse a request that could never be served.

    Raises:
        EmptyPromptError, PromptTooLongError, CapacityError, InvalidRequestError: the message
            states the limit and how to stay below it.
    """
    if not token_ids:
        raise EmptyPromptError("the prompt is empty: give at least one token")
    if len(token_ids) >= cache.max_model_len:
        raise prompt_too_long(f"{len(token_ids)}", cache.max_model_len)
    longest = most_tokens(cache, len(token_ids), params)
    if not cache.fits_alone(longest, num_prompt_tokens=len(token_ids), pinned_spans=pinned):
        blocks = pinned_blocks(cache.format, pinned, len(token_ids))
        spans = f" with {len(blocks)} blocks of {BLOCK_TOKENS} pinned exact" if blocks else ""
        raise CapacityError(
            f"This model's maximum context length is {cache.max_sequence_tokens} tokens in this "
            f"pool: {len(token_ids)} prompt tokens and up to {longest - len(token_ids)} generated "
            f"ones{spans} never fit: the pool holds a sequence of at most "
            f"{cache.max_sequence_tokens} tokens{' without pins' if blocks else ''}: raise "
            f"kv_cache_bytes, {'pin less, ' if blocks else ''}or lower max_tokens"
        )
    _check_logprobs(params, max_logprobs)
    if vocab_size is not None:
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
            bad = [t for t in getattr(params, name) or () if not 0 <= t < vocab_size]
            if bad:
                raise refusal(
                    f"{name} {shown(bad)} are outside the vocabulary of {vocab_size}", name
                )


def most_tokens(cache: SpectralKVCache, num_prompt_tokens: int, params: SamplingParams) -> int:
    """Return the most tokens that a request's sequence may get, its prompt included."""
    if params.max_tokens is None:
        room = min(cache.max_model_len, cache.max_sequence_tokens)
        return max(room, num_prompt_tokens + 1)  # a prompt without any room is refused
    # a token is sampled where none is asked for, because a prompt's last step samples one
    return min(num_prompt_tokens + max(1, params.max_tokens), cache.max_model_len)


def _check_logprobs(params: SamplingParams, max_logprobs: int) -> None:
    if max_logprobs == -1:
        return
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if name == "logprobs" and params.logprob_token_ids is not None:
            continue  # it is their number
        if value is not None and (value == -1 or value > max_logprobs):
            many = "all tokens" if value == -1 else str(value)
            raise refusal(
                f"{name} asks for {many}; at most {max_logprobs} are allowed here: ask for fewer, "
                "or raise max_logprobs",
                name,
            )


def prompt_too_long(size: str, max_model_len: int) -> PromptTooLongError:
    """Return the error of a prompt of `size` tokens, or of another unit that `size` names."""
    # clients know errors of length by their first words, which are OpenAI's
    return PromptTooLongError(
        f"This model's maximum context length is {max_model_len} tokens. The prompt has {size}; "
        f"with one to generate, max_model_len {max_model_len} allows {max_model_len - 1}: shorten "
        "it or raise max_model_len"
    )


def stalled(scheduler: Scheduler) -> PoolError:
    """Return the error of a scheduler that has requests and can run none of them."""
    return PoolError(
        f"no request can run: {len(scheduler.running)} running, {len(scheduler.waiting)} waiting; "
        "every sequence may hold slots that another caller of the same cache took"
    )
