"""Prompts as text, token ids or mappings, and their token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spectral_paged.errors import InvalidRequestError, cut, shown
from spectral_paged.sampling import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt", "pinned_spans")


def parts_of(prompt: Prompt) -> tuple[str | Sequence[int], str, Any]:
    """Return a prompt's text or token ids, its cache salt and its pinned spans.

    Raises:
        InvalidRequestError: a mapping has unknown keys, or no prompt.
    """
    if not isinstance(prompt, Mapping):
        return prompt, "", ()
    unknown = sorted(set(prompt) - set(PROMPT_KEYS), key=str)
    if unknown:
        raise InvalidRequestError(
            f"a prompt mapping has {shown(unknown)}; it takes {list(PROMPT_KEYS)}"
        )
    for key in ("prompt_token_ids", "prompt"):
        if key in prompt:
            return prompt[key], prompt.get("cache_salt") or "", prompt.get("pinned_spans", ())
    raise InvalidRequestError(
        f"a prompt mapping needs 'prompt' or 'prompt_token_ids'; got {shown(list(prompt))}"
    )


def check_salt(salt: object) -> str:
    """Return a cache salt unchanged.

    Raises:
        InvalidRequestError: the salt is no string.
    """
    if not isinstance(salt, str):
        raise InvalidRequestError(f"cache_salt is {shown(salt)}; it must be a string")
    return salt


def token_ids_of(prompt: str | Sequence[int], tokenizer: Any, vocab_size: int | None) -> list[int]:
    """Return the token ids of a prompt that is text or token ids.

    Raises:
        InvalidRequestError: there is no tokenizer for text, the text is not valid Unicode, the
            tokenizer refuses it, or an element is no token id of this vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequestError("a text prompt needs a tokenizer; pass token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the prompt is not valid text: {cut(str(error))}") from None
        try:
            token_ids = list(tokenizer(prompt)["input_ids"]) if prompt else []
        except Exception as error:  # of any type, and must end no other request
            raise InvalidRequestError(
                f"the tokenizer refuses the prompt: {shown(error)}"
            ) from error
        return _in_vocabulary(token_ids, vocab_size)
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
        raise InvalidRequestError(f"a prompt is text or token ids; got {shown(prompt)}")
    token_ids = list(prompt)
    for token in token_ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise InvalidRequestError(f"prompt token {shown(token)} is not a token id")
    return _in_vocabulary(token_ids, vocab_size)


def _in_vocabulary(token_ids: list[int], vocab_size: int | None) -> list[int]:
    """Return token ids unchanged; a tokenizer may know more of them than the model."""
    if vocab_size is not None and max(token_ids, default=0) >= vocab_size:
        token = next(token for token in token_ids if token >= vocab_size)
        raise InvalidRequestError(
            f"prompt token {shown(token)} is outside the vocabulary of {vocab_size}"
        )
    return token_ids


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt (text, token ids or a mapping) or many as a list of prompts.

    Raises:
        InvalidRequestError: `prompts` is none of these.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise InvalidRequestError(
            f"prompts is {shown(prompts)}; give text, token ids, a mapping, or a list of those"
        )
    items: list[Any] = list(prompts)
    if items and all(isinstance(x, int) for x in items):
        return [items]
    return items


def params_list(
    params: SamplingParams | Sequence[SamplingParams | None] | None,
    count: int,
    default: SamplingParams,
) -> list[SamplingParams]:
    """Return sampling parameters for each of `count` prompts; None stands for `default`.

    Raises:
        InvalidRequestError: `params` is a sequence of another length, or of other things.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * count
    rows: list[object] = list(params) if isinstance(params, Sequence) else [params]
    wrong = next((r for r in rows if not isinstance(r, SamplingParams | None)), None)
    if wrong is not None:
        raise InvalidRequestError(f"sampling_params has {shown(wrong)}; give SamplingParams(...)")
    if len(rows) != count:
        raise InvalidRequestError(
            f"{len(rows)} sampling parameters for {count} prompts: give one, or one a prompt"
        )
    return [row if isinstance(row, SamplingParams) else default for row in rows]
