"""The GPU that kernels are launched on, as far as paths and tiles depend on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

OLDEST = (7, 5)  # what Triton and torch still build for


@dataclass(frozen=True, slots=True)
class Card:
    """What decides the paths and tiles of a GPU.

    name: `NVIDIA H200`.
    capability: the compute capability, major and minor.
    shared_bytes: the most shared memory that a program may have.
    """

    name: str
    capability: tuple[int, int]
    shared_bytes: int

    @property
    def kind(self) -> str:
        """The name of all GPUs of this capability: `sm_90`."""
        return "sm_{}{}".format(*self.capability)

    @property
    def has_bf16(self) -> bool:
        """True if the hardware computes in bf16, not only in fp16."""
        return self.capability >= (8, 0)

    @property
    def has_tensor_cores(self) -> bool:
        """True if Gluon kernels run here, and `tl.dot` takes fp16 operands as they are: older
        tensor cores have other instructions, and products are made in fp32 without them."""
        return self.capability >= (8, 0)

    @property
    def has_warp_groups(self) -> bool:
        """True if products of `tl.dot` may read both operands from shared memory; elsewhere they
        pass through registers."""
        return self.capability[0] == 9

    @property
    def operand_bytes(self) -> int:
        """Bytes that an fp16 element of an operand of `tl.dot` takes in shared memory."""
        return 2 if self.has_tensor_cores else 4

    @property
    def has_dependent_launch(self) -> bool:
        """True if a kernel may start while the one before drains."""
        return self.capability >= (9, 0)


def check_card(device: torch.device) -> None:
    """Refuse a GPU that no kernel of the package is built for.

    Raises:
        ValueError: names the GPU, what is served, and what to use instead.
    """
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        raise ValueError(
            f"{name} is driven by ROCm {torch.version.hip}; kernels are for NVIDIA GPUs of compute "
            "capability 7.5 or newer: use device='cpu'"
        )
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        raise ValueError(
            f"{name} has compute capability {found[0]}.{found[1]}; kernels are for 7.5 or newer: "
            "use device='cpu'"
        )


@cache
def card_of(device: torch.device) -> Card | None:
    """The GPU of `device`; None for a CPU, and where kernels are interpreted."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    limits = driver.active.utils.get_device_properties(index)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return Card(name, capability, limits["max_shared_mem"])


# Tiles that a CPU interprets are those of the GPUs on which they were measured.
INTERPRETER = Card("Triton's interpreter", (9, 0), 227 << 10)


def limits_of(device: torch.device) -> Card:
    """The GPU by whose limits tiles are chosen: that of `device`, or what a CPU interprets."""
    return card_of(device) or INTERPRETER


def halved(*tile: int, fits: Callable[..., bool], least: int = 16) -> tuple[int, ...]:
    """The sizes of a tile, powers of two, of which the largest is halved until `fits(*tile)`.

    Raises:
        ValueError: not even the smallest tile fits.
    """
    sizes = list(tile)
    while not fits(*sizes):
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[largest] <= least:
            raise ValueError(f"a tile of {tuple(sizes)} does not fit the GPU's shared memory")
        sizes[largest] //= 2
    return tuple(sizes)
