"""The config that PEFT saves beside an adapter's tensors, read by type or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from spectral_paged.errors import AdapterError, cut, shown

MERGE = "merge it into the model (peft: merge_and_unload) and serve what comes of it"
# field of PEFT's config -> what it means where it is set
NOT_SERVED = {
    "use_dora": "it is a DoRA adapter, which scales the weights of the base",
    "lora_bias": "its B has a bias",
    "modules_to_save": "it replaces whole modules of the base",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are no linear layers",
    "trainable_token_indices": "it changes embeddings of tokens",
    "use_qalora": "it is a QA-LoRA adapter, which pools its inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it is an aLoRA adapter, which begins inside of a prompt",
    "monteclora_config": "it is a MonteCLoRA adapter",
    "kasa_config": "it is a KaSA adapter",
    "velora_config": "it is a VeLoRA adapter",
    "arrow_config": "it chooses among other adapters for each token",
}
# initialisations that leave the base as it is; others (PiSSA, OLoRA, ...) change its weights
KEEP_THE_BASE = ("gaussian", "orthogonal", "eva")

Value = TypeVar("Value")


def _end_of_name(pattern: str) -> str:
    """Return PEFT's expression for the layers of a pattern: the end of a name."""
    return rf"(.*\.)?({pattern})$"


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression ({error})") from None
    return text


def _layer_pattern(text: str) -> str:
    _expression(_end_of_name(text))
    return text


Expression = Annotated[str, AfterValidator(_expression)]
LayerPattern = Annotated[str, AfterValidator(_layer_pattern)]
Names = Expression | list[str] | set[str] | None
Rank = Annotated[int, Field(gt=0)]


class AdapterConfig(BaseModel):
    """The fields of PEFT's config that say what an adapter's tensors mean.

    Fields that have no meaning for tensors that are trained, such as the dropout, are not read.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    r: Rank
    lora_alpha: FiniteFloat
    rank_pattern: dict[LayerPattern, Rank] | None = None
    alpha_pattern: dict[LayerPattern, FiniteFloat] | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = True
    target_modules: Names = None
    exclude_modules: Names = None

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any], max_lora_rank: int) -> AdapterConfig:
        """Read an adapter's config, or refuse it.

        Args:
            name: of the adapter, for errors.

        Raises:
            AdapterError: the message says what is damaged or not served, and what to do.
        """
        kind = config.get("peft_type")
        kind = getattr(kind, "value", kind)
        if kind != "LORA":
            raise AdapterError(
                f"adapter {shown(name)} is of type {shown(str(kind))}, and LORA is served: {MERGE}"
            )
        for field, what in NOT_SERVED.items():
            if config.get(field):
                raise AdapterError(
                    f"adapter {shown(name)} has {field} {shown(config[field])}: {what}, which is "
                    f"not served: {MERGE}"
                )
        if config.get("bias", "none") != "none":
            raise AdapterError(
                f"adapter {shown(name)} has bias {shown(config['bias'])}: it changes biases of the "
                f"base, which is not served: {MERGE}"
            )
        try:
            found = cls.model_validate(dict(config))
        except ValidationError as error:
            raise _damaged(name, config, error) from None
        begins = found.init_lora_weights
        if isinstance(begins, str) and begins not in KEEP_THE_BASE:
            raise AdapterError(
                f"adapter {shown(name)} has init_lora_weights {shown(begins)}, which changed the "
                "weights of the base: save it with PEFT's path_initial_model_for_weight_conversion,"
                f" or {MERGE}"
            )
        check_rank(name, max([found.r, *(found.rank_pattern or {}).values()]), max_lora_rank)
        return found

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer."""
        return _of_layer(self.rank_pattern, layer, self.r)

    def scale_of(self, layer: str) -> float:
        """Return the factor of B A in a layer: alpha over the rank, or over its root (rsLoRA)."""
        alpha, rank = _of_layer(self.alpha_pattern, layer, self.lora_alpha), self.rank_of(layer)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def check_rank(name: str, rank: int, max_lora_rank: int) -> None:
    """Refuse an adapter of too high a rank.

    Raises:
        AdapterError: it is more than `max_lora_rank`.
    """
    if rank > max_lora_rank:
        raise AdapterError(
            f"adapter {shown(name)} has rank {shown(rank)}, and max_lora_rank is {max_lora_rank}: "
            f"give max_lora_rank={shown(rank)}"
        )


def _of_layer(patterns: Mapping[str, Value] | None, layer: str, usual: Value) -> Value:
    for pattern, own in (patterns or {}).items():
        if re.match(_end_of_name(pattern), layer):
            return own
    return usual


def _damaged(name: str, config: Mapping[str, Any], error: ValidationError) -> AdapterError:
    """Return the error of a config with a field of another type or range."""
    first = error.errors(include_url=False)[0]
    field, says = str(first["loc"][0]), str(first["msg"])
    if field in ("r", "rank_pattern"):
        pattern = config.get("rank_pattern") or {}
        own = pattern.values() if isinstance(pattern, Mapping) else [pattern]
        found = f"ranks {shown([config.get('r'), *own])}, which are no integers above 0"
    elif field in ("lora_alpha", "alpha_pattern"):
        found = (
            f"lora_alpha {shown(config.get('lora_alpha'))} and alpha_pattern "
            f"{shown(config.get('alpha_pattern'))}, which are no numbers by names"
        )
    else:
        found = f"{field} {shown(config.get(field))}, which PEFT does not write"
    return AdapterError(f"adapter {shown(name)} has {found} ({cut(says)}): fetch its config again")
