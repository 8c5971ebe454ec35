"""Seal blocks of the tail: decide the basis if need be, encode, and learn which held NaN or Inf."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_paged.cache.cache_basis import CacheBasis
from spectral_paged.cache.encoder import BlockKind, Encoder, count_non_finite, encoder_of
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.seal_schedule import DueBlock
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.device import DeviceTimer, Download, upload
from spectral_paged.errors import NonFiniteError
from spectral_paged.kernels.ops import PageOps
from spectral_paged.kernels.page.layout import BLOCK_TOKENS

Failures = dict[SequenceState, NonFiniteError]


class SealCheck:
    """Whether blocks that were sealed held NaN or Inf.

    Args:
        due: the blocks.
        bad: int32 `[B, L, H, 2]`, elements of K and of V of each that are NaN or Inf.
        layers: the model layers that `bad` is of.
    """

    def __init__(self, due: Sequence[DueBlock], bad: Tensor, layers: Sequence[int]) -> None:
        self._blocks = [([item.sequence], item.block) for item in due]  # who holds it, which
        self._bad = Download(bad)
        self._layers = layers
        self.sequences = {item.sequence for item in due}

    @property
    def is_known(self) -> bool:
        """True where `failed` has nothing to wait for."""
        return self._bad.is_here

    def failed(self) -> Failures:
        """The first NaN or Inf of each sequence that has one; waits for the device."""
        found: Failures = {}
        for index, layer, head, side in self._bad.get()[0].nonzero().tolist():
            holders, block = self._blocks[index]
            for sequence in holders:
                if sequence not in found:
                    where = self._layers[layer], head, block
                    found[sequence] = _non_finite("KV"[side], sequence.seq_id, *where)
        return found

    def forked(self, parent: SequenceState, child: SequenceState) -> None:
        """`child` holds what `parent` does: it is told too, whoever is freed meanwhile."""
        for holders, _ in self._blocks:
            if parent in holders:
                holders.append(child)
                self.sequences.add(child)


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
            group: BlockKind(group.layers, group.layout, group.arena.dtype, group.rotation)
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

    def seal(self, group: LayerGroup, due: list[DueBlock]) -> None:
        """Write the pages of `due` blocks; later calls of `failures` tell which are bad."""
        if due:
            with self.timer:
                self._checks.append(self._encode(group, due))

    def forked(self, parent: SequenceState, child: SequenceState) -> None:
        """What is found in blocks of `parent` later is a failure of its copy too."""
        for check in self._checks:
            check.forked(parent, child)

    def failures(self) -> Failures:
        """Sequences found with NaN or Inf that no call has told yet; waits for all checks."""
        return self._take(self._checks)

    def failures_with(self, sequence: SequenceState) -> Failures:
        """Those of `failures` that are known once the checks of `sequence` are; waits for these."""
        return self._take([check for check in self._checks if sequence in check.sequences])

    def known_failures(self) -> Failures:
        """Those of `failures` that are known now."""
        return self._take([])

    def _take(self, waited: Sequence[SealCheck]) -> Failures:
        """What known checks and those of `waited` have found; the others are kept."""
        found: Failures = {}
        kept = []
        for check in self._checks:
            if check.is_known or check in waited:
                found |= check.failed()
            else:
                kept.append(check)
        self._checks = kept
        return found

    def _encode(self, group: LayerGroup, due: list[DueBlock]) -> SealCheck:
        planes = group.arena.planes
        units = [item.slots.block_units(item.block) for item in due]
        landmarks = self.basis.format.num_landmark_tokens
        exact, pages, first = (
            upload(x, torch.int32, planes.device)
            for x in (
                [exact for exact, _ in units],
                [page for _, page in units],
                [landmarks + item.block * BLOCK_TOKENS for item in due],
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
