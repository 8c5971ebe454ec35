"""A request holds the LoRA adapter that it names, which separates what it finds in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict

from spectral_paged.cache import StepPlan
from spectral_paged.engine.requests import Adapter, Completion
from spectral_paged.errors import AdapterError, shown
from spectral_paged.options import LoRARequest

MARK = "lora:"


class Adapters(Protocol):
    """The adapters of a model; `models.lora.LoadedAdapters` are those of LLMs."""

    def hold(self, request: LoRARequest, *, waits: bool) -> Adapter: ...


class ModelInputs(TypedDict, total=False):
    """What a runner is told beside a step's tokens.

    adapters: the index of each sequence's adapter, in plan order.
    """

    adapters: Sequence[int]


def held(
    adapters: Adapters | None, request: LoRARequest | None, *, waits: bool = False
) -> Adapter | None:
    """Return the adapter of a request, loaded and held; None: it names none.

    Args:
        waits: the request waits where no place is free, until its adapter's `place` finds one.

    Raises:
        AdapterError: there are no adapters here, or as `LoadedAdapters.hold`.
    """
    if request is None:
        return None
    if not isinstance(request, LoRARequest):
        raise AdapterError(
            f"lora_request is {shown(request)}; give LoRARequest(name, id, path), or None"
        )
    if adapters is None:
        raise AdapterError(
            f"adapter {shown(request.lora_name)} is asked for, and there is room for none: "
            "make the LLM with enable_lora=True"
        )
    return adapters.hold(request, waits=waits)


def prefix_salt(cache_salt: str, adapter: Adapter | None) -> str:
    """Return what separates a request's cached tokens: its salt, and its adapter's key.

    No salt spells the mark of an adapter, because one that begins with it gets a further colon,
    where a key has a hexadecimal digit.
    """
    if adapter is not None:
        return f"{MARK}{adapter.key}{cache_salt}"
    return f"{MARK}:{cache_salt}" if cache_salt.startswith(MARK) else cache_salt


def indices_of(plan: StepPlan, by_sequence: Mapping[str, Completion]) -> ModelInputs:
    """Return the adapters of a step; nothing where no sequence has one."""
    owners = [by_sequence[seq_id].owner for seq_id in plan.seq_ids]
    indices = [0 if owner.adapter is None else owner.adapter.index for owner in owners]
    return ModelInputs(adapters=indices) if any(indices) else ModelInputs()
