"""A model's end tokens and sampling defaults, from every file that names them."""

from __future__ import annotations

import json
import logging
from typing import Any

from spectral_paged.errors import CorruptFileError, InvalidRequestError, SamplingParamsError, shown
from spectral_paged.models.checkpoint_files import find_file
from spectral_paged.sampling import SamplingParams

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
CHOICES = ("auto", "none")
# fields of the generation config that vLLM samples by, and their names in `SamplingParams`
_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def check_choice(choice: str) -> str:
    """Return a choice of generation config unchanged.

    Raises:
        InvalidRequestError: it is none of `CHOICES`.
    """
    if choice not in CHOICES:
        raise InvalidRequestError(
            f"generation_config is {shown(choice)}; it must be 'auto' (the model's own) or 'none'"
        )
    return choice


def check_file_of(where: str) -> None:
    """Refuse a model whose generation config cannot be read; transformers would ignore it.

    Raises:
        CorruptFileError: the file is no JSON object.
    """
    path = find_file(where, FILE)
    if path is None:
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} cannot be read ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds no JSON object: fetch it again")


def sampling_defaults(model: Any, choice: str) -> dict[str, Any]:
    """Return the sampling values that a model's generation config names, as vLLM reads them.

    Args:
        choice: `auto`, or `none` for no values.

    Raises:
        CorruptFileError: a value is outside its range; the message names it.
    """
    if check_choice(choice) == "none":
        return {}
    asked = model.generation_config.to_diff_dict()
    found = {ours: asked[name] for name, ours in _FIELDS.items() if asked.get(name) is not None}
    try:
        SamplingParams(**found)
    except SamplingParamsError as error:
        raise CorruptFileError(
            f"the model's generation config cannot be sampled by: {error}; mend {FILE}, or pass "
            "generation_config='none'"
        ) from error
    if found:
        logger.info("requests that name no value are sampled by the model's own: %s", found)
    return found


def end_tokens(model: Any, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a text: those of the config, its generation config, the tokenizer.

    A config without an end has its class's default. Where others name ends, the default is one
    only if the tokenizer knows it as a special token. Ids outside the vocabulary, which cannot be
    generated, are left out.

    Raises:
        CorruptFileError: an id is no integer.
    """
    config, generation = model.config, model.generation_config
    own = _ids(getattr(config, "eos_token_id", None), "config")
    asked = _ids(generation.eos_token_id, "generation config")
    named = _ids(getattr(tokenizer, "eos_token_id", None), "tokenizer")
    if not (generation._from_model_config and asked == own):  # else it is a copy of the config's
        named += asked
    if named and own == _ids(getattr(type(config), "eos_token_id", None), "config"):
        special = getattr(tokenizer, "all_special_ids", ())
        own = [token for token in own if token in special]
    return tuple(t for t in dict.fromkeys([*own, *named]) if 0 <= t < vocab_size)


def _ids(value: object, source: str) -> list[int]:
    ids: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if value is None:
        return []
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise CorruptFileError(
                f"eos_token_id of the {source} is {shown(value)}: it must be a token id, or a list"
            )
    return ids
