"""The device a model runs on, its dtype, and the memory of its cache."""

from __future__ import annotations

import torch

from spectral_paged.errors import CapacityError, InvalidRequestError, shown
from spectral_paged.kernels.launch.card import card_of, check_card

DEFAULT_CPU_CACHE_BYTES = 1 << 30


def choose_device(device: str) -> torch.device:
    """The torch device of that name; `auto` is CUDA where the machine has it, else the CPU.

    Raises:
        InvalidRequestError: the name is no device, the machine has none of that name, or it is a
            GPU that no kernel serves.
    """
    cuda = torch.cuda.is_available()
    try:
        where = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise InvalidRequestError(f"device is {shown(device)}; use auto, cpu or cuda") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0}.get(where.type, 0)
    if (where.index or 0) >= count:
        raise InvalidRequestError(
            f"device is {shown(device)}, which is not there: this machine offers "
            f"{'cpu and cuda' if cuda else 'cpu'}"
        )
    check_device(where)
    return where


def check_device(device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Refuse a GPU that no kernel serves, or that does not compute in `dtype`.

    Raises:
        InvalidRequestError: names the GPU, and what to use instead.
    """
    try:
        check_card(device)
    except ValueError as error:
        raise InvalidRequestError(f"device is {str(device)!r}: {error}") from error
    card = card_of(device)
    if dtype is torch.bfloat16 and card is not None and not card.has_bf16:
        raise InvalidRequestError(
            f"dtype is 'bfloat16', and {card.name} ({card.kind}) does not compute in it: use "
            "'auto' or 'float16'"
        )


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto` is fp32 on the CPU, and on CUDA bf16, or fp16 where the GPU
    has no bf16.

    Raises:
        InvalidRequestError: the name is no supported dtype, or the GPU does not compute in it.
    """
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        card = card_of(device)
        return torch.bfloat16 if card is None or card.has_bf16 else torch.float16
    names = {
        "float32": torch.float32,
        "float": torch.float32,
        "float16": torch.float16,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if isinstance(dtype, str):
        found = names.get(dtype)
    else:
        found = dtype if dtype in names.values() else None
    if found is None:
        raise InvalidRequestError(f"dtype is {shown(dtype)}; use 'auto' or one of {sorted(names)}")
    check_device(device, found)
    return found


def check_utilization(utilization: float) -> None:
    """Refuse a share of the GPU's memory that is none.

    Raises:
        InvalidRequestError: it is no number in (0, 1].
    """
    number = isinstance(utilization, int | float) and not isinstance(utilization, bool)
    if not number or not 0 < utilization <= 1:
        raise InvalidRequestError(
            f"gpu_memory_utilization is {shown(utilization)}; it must be in (0, 1]"
        )


def choose_cache_bytes(
    given: int | None, utilization: float, device: torch.device, reserved: int = 0
) -> int:
    """Bytes of the arenas: `given`, or the rest of the GPU's share, or 1 GiB on the CPU.

    Args:
        utilization: share of the GPU's memory for everything together: memory in use already
            (weights, other processes), the arenas, and `reserved` bytes for a step's activations.

    Raises:
        InvalidRequestError: the share lies outside (0, 1].
        CapacityError: the share leaves nothing for the arenas.
    """
    if given is not None:
        return given
    if device.type != "cuda":
        return DEFAULT_CPU_CACHE_BYTES
    check_utilization(utilization)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = int(free - total * (1 - utilization)) - reserved
    if left <= 0:
        raise CapacityError(
            f"gpu_memory_utilization {utilization} of {total / 1e9:.1f} GB leaves nothing for the "
            f"cache: {(total - free) / 1e9:.1f} GB are taken and a step needs {reserved / 1e9:.1f} "
            "GB: raise it, or lower max_num_batched_tokens or max_num_seqs"
        )
    return left
