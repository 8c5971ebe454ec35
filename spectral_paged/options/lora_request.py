"""A request names the LoRA adapter that it wants: its name, its id, and where its files are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectral_paged.errors import AdapterError, shown

KEYS = ("name", "path", "base_model_name")  # of vLLM's JSON form


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter by its name, as in vLLM.

    Args:
        lora_name: the name by which it is known while it is loaded.
        lora_int_id: a number that no other adapter has, at least 1 and below 2**63.
        lora_path: a folder that PEFT saved; "": an adapter of that name is loaded already.

    Raises:
        AdapterError: a value is of another type, the name is empty, or the id is out of its range.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise AdapterError(f"lora_name is {shown(self.lora_name)}; it must be a text")
        number = self.lora_int_id
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**63:
            raise AdapterError(
                f"lora_int_id is {shown(number)}; it must be an integer above 0, and below 2**63"
            )
        if not isinstance(self.lora_path, str | os.PathLike):
            raise AdapterError(f"lora_path is {shown(self.lora_path)}; it must be a folder's path")
        object.__setattr__(self, "lora_path", os.fsdecode(self.lora_path))


LoRARequests = LoRARequest | Iterable[LoRARequest | None] | None


def lora_list(requests: LoRARequests, count: int) -> list[LoRARequest | None]:
    """Return the adapter of each of `count` prompts; one or none is that of all.

    Raises:
        AdapterError: `requests` has another length, or other things in it.
    """
    if requests is None or isinstance(requests, LoRARequest):
        return [requests] * count
    if isinstance(requests, str | Mapping) or not isinstance(requests, Iterable):
        raise _no_request(requests)
    listed = list(requests)
    for item in listed:
        if not isinstance(item, LoRARequest | None):
            raise _no_request(item)
    if len(listed) != count:
        raise AdapterError(
            f"{len(listed)} lora_requests for {count} prompts: give one, or one a prompt (None for "
            "the base model)"
        )
    return listed


def _no_request(value: object) -> AdapterError:
    return AdapterError(f"lora_request is {shown(value)}; give LoRARequest(name, id, path)")


def lora_modules(texts: Sequence[str]) -> list[LoRARequest]:
    """Read `name=path`, or vLLM's `{"name": ..., "path": ...}`, of adapters loaded at the start.

    Their ids are 1, 2, ... in this order.

    Raises:
        AdapterError: a text is neither, or a name is there twice.
    """
    found: list[LoRARequest] = []
    for number, text in enumerate(texts, start=1):
        name, path = _module(text)
        if any(other.lora_name == name for other in found):
            raise AdapterError(f"lora_modules has {shown(name)} twice: give each adapter its name")
        found.append(LoRARequest(name, number, path))
    return found


def _module(text: str) -> tuple[str, str]:
    if text.lstrip().startswith("{"):
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"lora_modules has {shown(text)}, no JSON ({error})") from None
        if unknown := sorted(set(value) - set(KEYS)):
            raise AdapterError(f"lora_modules has {shown(unknown)}; it takes {', '.join(KEYS)}")
        name, path = value.get("name"), value.get("path")
    else:
        name, _, path = text.partition("=")
    if not (isinstance(name, str) and isinstance(path, str) and name and path):
        raise AdapterError(f"lora_modules has {shown(text)}; write NAME=PATH")
    return name, path
