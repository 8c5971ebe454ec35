"""Seal blocks of the tail: decide the basis if need be, encode, and learn which held NaN or Inf."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_paged.cache.cache_basis import CacheBasis
from spectral_paged.cache.encoder import BlockKind, Encoder, count_non_finite, encoder_of
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.device import DeviceTimer, Download, upload
from spectral_paged.errors import NonFiniteError
from spectral_paged.kernels.ops import PageOps
from spectral_paged.kernels.page.layout import BLOCK_TOKENS


class SealCheck:
    """Whether blocks that were sealed held NaN or Inf.

    Args:
        blocks: (sequence, block) pairs.
        bad: int32 `[B, L, H, 2]`, elements of K and of V of each that are NaN or Inf.
        layers: the model layers that `bad` is of.
    """

    def __init__(
        self, blocks: Sequence[tuple[str, int]], bad: Tensor, layers: Sequence[int]
    ) -> None:
        self._blocks = [([seq_id], block) for seq_id, block in blocks]  # who holds it, which
        self._bad = Download(bad)
        self._layers = layers
        self.seq_ids = {seq_id for seq_id, _ in blocks}

    @property
    def is_known(self) -> bool:
        """True where `failed` has nothing to wait for."""
        return self._bad.is_here

    def failed(self) -> dict[str, NonFiniteError]:
        """The first NaN or Inf of each sequence that has one; waits for the device."""
        found: dict[str, NonFiniteError] = {}
        for index, layer, head, side in self._bad.get()[0].nonzero().tolist():
            holders, block = self._blocks[index]
            for seq_id in holders:
                if seq_id not in found:
                    where = self._layers[layer], head, block
                    found[seq_id] = _non_finite("KV"[side], seq_id, *where)
        return found

    def forked(self, parent_id: str, child_id: str) -> None:
        """`child_id` holds what `parent_id` does: it is told too, whoever is freed meanwhile."""
        for holders, _ in self._blocks:
            if parent_id in holders:
                holders.append(child_id)
                self.seq_ids.add(child_id)


class Sealer:
    """Encodes due blocks of a group; pages are written but not shown yet.

    Args:
        groups: every group of the cache; those with pages get an encoder each.
        basis: the cache's calibration, decided here at the first seal where it is taken online.
        ops: what runs on the cache's device.
        device: of the cache.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        basis: CacheBasis,
        ops: PageOps,
        device: torch.device,
    ) -> None:
        self.basis = basis
        self.timer = DeviceTimer(device)
        self._kinds = {
            group: BlockKind(group.layers, group.layout, group.arena.dtype, group.cos, group.sin)
            for group in groups
            if group.layout is not None
        }
        self.encoders: dict[LayerGroup, Encoder] = {
            group: encoder_of(kind, basis, ops) for group, kind in self._kinds.items()
        }
        self._checks: list[SealCheck] = []

    def warm_up(self, group: LayerGroup) -> None:
        """Compile what seals, which takes seconds that a first seal would cost; nothing is
        written. An online calibration has yet to say what it is to do."""
        if group in self.encoders and not self.basis.is_waiting:
            self.encoders[group].warm_up(group.arena.planes)

    def seal(self, group: LayerGroup, due: list[tuple[str, int]]) -> None:
        """Write the pages of `due` (sequence, block) pairs; `failures` tells which are bad."""
        if due:
            with self.timer:
                self._checks.append(self._encode(group, due))

    def forked(self, parent_id: str, child_id: str) -> None:
        """What is found in blocks of `parent_id` later is a failure of its copy too."""
        for check in self._checks:
            check.forked(parent_id, child_id)

    def failures(self, wait_for: Callable[[SealCheck], bool]) -> dict[str, NonFiniteError]:
        """Sequences found with NaN or Inf since the last call; checks that are not known yet are
        waited for where `wait_for` says so, and kept otherwise."""
        found: dict[str, NonFiniteError] = {}
        kept = []
        for check in self._checks:
            if check.is_known or wait_for(check):
                found |= check.failed()
            else:
                kept.append(check)
        self._checks = kept
        return found

    def _encode(self, group: LayerGroup, due: list[tuple[str, int]]) -> SealCheck:
        planes = group.arena.planes
        units = [group.block_units(seq_id, block) for seq_id, block in due]
        landmarks = self.basis.format.num_landmark_tokens
        exact, pages, first = (
            upload(x, torch.int32, planes.device)
            for x in (
                [exact for exact, _ in units],
                [page for _, page in units],
                [landmarks + block * BLOCK_TOKENS for _, block in due],
            )
        )
        bad = self._decide_basis(group, exact, first) if self.basis.is_waiting else None
        # without a basis still, every block due has NaN or Inf, and is only to be refused
        if bad is None or not self.basis.is_waiting:
            bad = self.encoders[group].seal(planes, exact, pages, first)
        return SealCheck(due, bad, group.layers)

    def _decide_basis(self, group: LayerGroup, exact: Tensor, first: Tensor) -> Tensor:
        """Let blocks decide the basis; those with NaN or Inf are left out, and where there are no
        others nothing is decided. Returns their `bad`."""
        kind, accumulator, found = self._kinds[group], self.basis.accumulator(), []
        for block in range(len(exact)):
            k, v = kind.read(group.arena.planes, exact[block : block + 1])
            found.append(count_non_finite(k, v))
            if not bool(found[-1].any()):
                turned = {
                    f"k_{r}": kind.stored(k, first[block : block + 1], r)[0]
                    for r in ("pre", "frame")
                }
                accumulator.add(group.layers, k_post=k[0], v=v[0], **turned)
        bad = torch.cat(found)
        if not bool(bad.flatten(1).any(dim=1).all()):
            self.basis.freeze(accumulator)
        return bad


def _non_finite(side: str, seq_id: str, layer: int, head: int, block: int) -> NonFiniteError:
    return NonFiniteError(
        f"{side} of sequence {seq_id!r} has NaN or Inf in layer {layer}, head {head}, block "
        f"{block}: the model produced it; check its dtype (fp16 overflow) and its weights",
        block_index=block,
    )
