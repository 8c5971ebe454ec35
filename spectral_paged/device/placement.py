"""The device a model runs on, its dtype, and the memory of its cache."""

from __future__ import annotations

import torch

from spectral_paged.errors import CapacityError, InvalidRequestError, shown

DEFAULT_CPU_CACHE_BYTES = 1 << 30


def choose_device(device: str) -> torch.device:
    """The torch device of that name; `auto` is CUDA where the machine has it, else the CPU.

    Raises:
        InvalidRequestError: the name is no device, or the machine has none of that name.
    """
    cuda = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise InvalidRequestError(f"device is {shown(device)}; use auto, cpu or cuda") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0}.get(where.type, 0)
    if (where.index or 0) >= count:
        raise InvalidRequestError(
            f"device is {shown(device)}, which is not there: this machine offers "
            f"{'cpu and cuda' if cuda else 'cpu'}"
        )
    return where


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto` is fp32 on the CPU and bf16 on CUDA.

    Raises:
        InvalidRequestError: the name is no supported dtype.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    names = {
        "float32": torch.float32,
        "float": torch.float32,
        "float16": torch.float16,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if isinstance(dtype, torch.dtype) and dtype in names.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in names:
        raise InvalidRequestError(f"dtype is {shown(dtype)}; use 'auto' or one of {sorted(names)}")
    return names[dtype]


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
