"""Copies between the places of a device and pieces of host memory, as the host makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Copy(Protocol):
    """A copy that was begun."""

    @property
    def is_done(self) -> bool: ...
    @property
    def failed(self) -> bool:
        """True once it is known that the bytes never come."""

    def wait(self) -> None:
        """Wait for the copy on the host."""

    def hold(self) -> None:
        """Let the device's later work wait for the copy."""


class Copier(Protocol):
    """Begins copies. `views` are uint8 tensors of any strides, `pieces` flat ones on the host."""

    def save(self, views: Sequence[Tensor], pieces: Sequence[Tensor]) -> Copy:
        """Copy the bytes of `views`, in order, to `pieces`."""

    def load(self, pieces: Sequence[Tensor], views: Sequence[Tensor | int]) -> Copy:
        """Copy the bytes of `pieces`, in order, to `views`; a number skips so many bytes."""


def join(views: Sequence[Tensor]) -> Tensor:
    """The bytes of `views` one behind the other, on their device."""
    total = sum(view.numel() for view in views)
    flat, at = torch.empty(total, dtype=torch.uint8, device=views[0].device), 0
    for view in views:
        flat[at : at + view.numel()].view(view.shape).copy_(view)
        at += view.numel()
    return flat


def scatter(flat: Tensor, views: Sequence[Tensor | int]) -> None:
    """Write bytes to `views`, in order; a number skips so many bytes."""
    at = 0
    for view in views:
        if isinstance(view, int):
            at += view
            continue
        view.copy_(flat[at : at + view.numel()].view(view.shape))
        at += view.numel()


class DoneCopy:
    """A copy that was done when it began."""

    is_done, failed = True, False

    def wait(self) -> None:
        pass

    def hold(self) -> None:
        pass


class HostCopier:
    """Copies that the calling thread makes, where the cache is in host memory too."""

    def save(self, views: Sequence[Tensor], pieces: Sequence[Tensor]) -> Copy:
        flat = join(views)
        for source, piece in zip(flat.split([len(piece) for piece in pieces]), pieces, strict=True):
            piece.copy_(source)
        return DoneCopy()

    def load(self, pieces: Sequence[Tensor], views: Sequence[Tensor | int]) -> Copy:
        scatter(torch.cat(list(pieces)), views)
        return DoneCopy()
