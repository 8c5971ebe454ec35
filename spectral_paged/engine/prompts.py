"""Prompts as callers give them: text, token ids or mappings, one or many.

Token ids are a list, tuple, array or tensor. A mapping is vLLM's, or what a tokenizer returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.sampling import SamplingParams, plain_list

Prompt = str | Sequence[int] | Mapping[str, Any]
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt", "pinned_spans")
ENCODING_KEYS = ("input_ids", "attention_mask", "token_type_ids")  # what tokenizers return


def parts_of(prompt: Prompt) -> tuple[str | Sequence[int], str, Any]:
    """Return a prompt's text or token ids, its cache salt and its pinned spans.

    Raises:
        InvalidRequestError: a mapping has unknown keys, or no prompt, or a tokenizer's answer holds
            several.
    """
    if not isinstance(prompt, Mapping):
        return prompt, "", ()
    salt, pinned = prompt.get("cache_salt") or "", prompt.get("pinned_spans", ())
    if "input_ids" in prompt:
        rows = encoded_rows(prompt)
        if len(rows) != 1:
            raise InvalidRequestError(
                f"input_ids has {len(rows)} prompts where one is asked for: give what the "
                "tokenizer returned by itself, not in a list"
            )
        return rows[0], salt, pinned
    unknown = sorted(set(prompt) - set(PROMPT_KEYS), key=str)
    if unknown:
        raise InvalidRequestError(
            f"a prompt mapping has {shown(unknown)}; it takes {list(PROMPT_KEYS)}"
        )
    for key in ("prompt_token_ids", "prompt"):
        if key in prompt:
            return prompt[key], salt, pinned
    raise InvalidRequestError(
        f"a prompt mapping needs 'prompt' or 'prompt_token_ids'; got {shown(list(prompt))}"
    )


def encoded_rows(encoding: Mapping[str, Any]) -> list[list[Any]]:
    """Return the token ids of each prompt in a tokenizer's answer, without what its mask hides.

    Raises:
        InvalidRequestError: it has unknown keys, or ids and mask are of different shapes.
    """
    unknown = sorted(set(encoding) - {*ENCODING_KEYS, *PROMPT_KEYS[2:]}, key=str)
    if unknown:
        raise InvalidRequestError(
            f"a mapping with input_ids has {unknown}; it takes {list(ENCODING_KEYS)}: give "
            "{'prompt_token_ids': ...} instead"
        )
    ids = _rows(encoding["input_ids"], "input_ids")
    if encoding.get("attention_mask") is None:
        return ids
    masks = _rows(encoding["attention_mask"], "attention_mask")
    if list(map(len, ids)) != list(map(len, masks)):
        raise InvalidRequestError("input_ids and attention_mask are of different shapes")
    return [
        [token for token, shown in zip(*pair, strict=True) if shown]
        for pair in zip(ids, masks, strict=True)
    ]


def _rows(values: object, name: str) -> list[list[Any]]:
    """Return one list, or a list of lists, as a list of lists."""
    items = plain_list(values, name)
    if items is None:
        raise InvalidRequestError(f"{name} is {shown(values)}; it must be a list of token ids")
    nested = [isinstance(item, list | tuple) for item in items]
    if any(nested) and not all(nested):
        raise InvalidRequestError(f"{name} mixes numbers and lists: give a list of each prompt")
    return [list(item) for item in items] if any(nested) else [items]


def check_salt(salt: object) -> str:
    """Return a cache salt unchanged.

    Raises:
        InvalidRequestError: the salt is no string.
    """
    if not isinstance(salt, str):
        raise InvalidRequestError(f"cache_salt is {shown(salt)}; it must be a string")
    return salt


def prompt_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Return one prompt (text, token ids or a mapping) or many as a list of prompts.

    Many are a list, a column of a table, a generator, or an array with a row for each. A
    tokenizer's answer is as many prompts as it has rows.

    Raises:
        InvalidRequestError: `prompts` is none of these.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        rows = encoded_rows(prompts)
        return [prompts] if len(rows) == 1 else [{"prompt_token_ids": row} for row in rows]
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items = plain_list(prompts, "prompts")
    if items is None:
        raise InvalidRequestError(
            f"prompts is {shown(prompts)}; give text, token ids, a mapping, or a list of those"
        )
    if items and all(isinstance(x, int) for x in items):
        return [items]
    return items


def params_list(
    params: SamplingParams | Iterable[SamplingParams | None] | None,
    count: int,
    default: SamplingParams,
) -> list[SamplingParams]:
    """Return sampling parameters for each of `count` prompts; None stands for `default`.

    Raises:
        InvalidRequestError: `params` is a sequence of another length, or of other things.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * count
    listed = plain_list(params, "sampling_params")
    rows: list[object] = [params] if listed is None else listed
    wrong = next((r for r in rows if not isinstance(r, SamplingParams | None)), None)
    if wrong is not None:
        raise InvalidRequestError(f"sampling_params has {shown(wrong)}; give SamplingParams(...)")
    if len(rows) != count:
        raise InvalidRequestError(
            f"{len(rows)} sampling parameters for {count} prompts: give one, or one a prompt"
        )
    return [row if isinstance(row, SamplingParams) else default for row in rows]
