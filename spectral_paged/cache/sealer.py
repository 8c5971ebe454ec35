"""The sealer encodes due blocks into pages, shows them, and checks them for NaN and Inf."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_paged.cache.cache_basis import CacheBasis
from spectral_paged.cache.encoder import BlockKind, Encoder, count_non_finite, encoder_of
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.observer import Observers
from spectral_paged.cache.plan import StepReport
from spectral_paged.cache.seal_schedule import DueBlock, blocks_to_seal
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.cache.stats import CacheCounters
from spectral_paged.device import DeviceTimer, Download, upload
from spectral_paged.errors import NonFiniteError, shown
from spectral_paged.kernels.ops import PageOps
from spectral_paged.kernels.page.layout import BLOCK_TOKENS


class SealCheck:
    """A check of sealed blocks for NaN and Inf, whose result may still be on the device.

    Args:
        due: the sealed blocks.
        bad: int32 `[B, L, H, 2]`, numbers of elements of K and of V that are NaN or Inf.
        layers: model layers of `bad`'s second dimension.
    """

    def __init__(self, due: Sequence[DueBlock], bad: Tensor, layers: Sequence[int]) -> None:
        self._blocks = [([item.sequence], item.block) for item in due]  # holders, block
        self._bad = Download(bad)
        self._layers = layers
        self.sequences = {item.sequence for item in due}

    @property
    def is_known(self) -> bool:
        """True if `failed` need not wait."""
        return self._bad.is_here

    def failed(self) -> dict[SequenceState, NonFiniteError]:
        """The first NaN or Inf of each sequence that has one; waits for the device."""
        found: dict[SequenceState, NonFiniteError] = {}
        for index, layer, head, side in self._bad.get()[0].nonzero().tolist():
            holders, block = self._blocks[index]
            for sequence in holders:
                if sequence not in found:
                    where = self._layers[layer], head, block
                    found[sequence] = _non_finite("KV"[side], sequence.seq_id, *where)
        return found

    def forked(self, parent: SequenceState, child: SequenceState) -> None:
        """Report failures of blocks of `parent` for `child` too, even if `parent` is freed."""
        for holders, _ in self._blocks:
            if parent in holders:
                holders.append(child)
                self.sequences.add(child)


class Sealer:
    """A sealer writes the pages of sequences' due blocks, and the page table shows them once the
    next query sees them. Sequences with NaN or Inf fail, at once or when a check is known.

    Args:
        groups: every group of the cache; each group with pages gets an encoder.
        basis: the cache's calibration; an online one is decided here, at the first seal.
        ops: the page ops of the cache's device.
        device: the cache's device.
        observers, counters: the cache's, which hear of every sealed block.

    Attributes:
        unreported: failures that are known, and that no report has listed.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        basis: CacheBasis,
        ops: PageOps,
        device: torch.device,
        observers: Observers,
        counters: CacheCounters,
    ) -> None:
        self.basis = basis
        self.timer = DeviceTimer(device)
        self._observers, self._counters = observers, counters
        self._sealing = [(place, group) for place, group in enumerate(groups) if group.seals]
        self._kinds = {
            group: BlockKind(group.layers, group.layout, group.arena.dtype, group.rotation)
            for group in groups
            if group.layout is not None
        }
        self.encoders: dict[LayerGroup, Encoder] = {
            group: encoder_of(kind, basis, ops) for group, kind in self._kinds.items()
        }
        self._checks: list[SealCheck] = []
        self.unreported = StepReport()

    def warm_up(self, group: LayerGroup) -> None:
        """Compile the kernels that seal, so that the first seal need not wait; nothing is written.

        An online calibration that still waits compiles nothing, because it has no basis yet.
        """
        if group in self.encoders and not self.basis.is_waiting:
            self.encoders[group].warm_up(group.arena.planes)

    def seal_due(self, sequences: Sequence[SequenceState]) -> None:
        """Seal the blocks of these sequences that are due, and show those that the next query sees.

        If an error interrupts this, the sequences stay `overdue`.
        """
        for state in sequences:
            state.overdue = True
        for place, group in self._sealing:
            self._seal_group(place, group, sequences)
        for state in sequences:
            state.overdue = False

    def _seal_group(
        self, place: int, group: LayerGroup, sequences: Sequence[SequenceState]
    ) -> None:
        due = blocks_to_seal(sequences, place)
        self.seal(group, due)
        self._take_failures()
        for item in due:
            if item.sequence.error is None and item.slots.note_encoded(item.block):
                item.sequence.num_pages_sealed += len(group.layers)
                self._counters.pages_sealed += len(group.layers)
                self._observers.sealed(item.sequence.seq_id, item.block, group.layers)
        for state in sequences:
            if state.error is None:
                state.slots[place].publish_sealed(state.chain, state.visible_blocks())

    def seal(self, group: LayerGroup, due: list[DueBlock]) -> None:
        """Write the pages of `due` blocks; bad ones fail their sequences once that is known."""
        if due:
            self._checks.append(self._encode(group, due))

    def forked(self, parent: SequenceState, child: SequenceState) -> None:
        """Let failures found later in blocks of `parent` count for its copy `child` too."""
        for check in self._checks:
            check.forked(parent, child)

    def wait(self) -> None:
        """Wait for the checks of all blocks sealed so far, and fail the sequences of bad ones."""
        self._take_failures(self._checks)

    def freed(self, sequence: SequenceState) -> None:
        """Wait for the checks of `sequence`, whose error then says if its slots can be trusted, and
        report it no more, because another sequence may take its id."""
        self._take_failures([check for check in self._checks if sequence in check.sequences])
        self.unreported.failed.pop(sequence.seq_id, None)

    def take_report(self) -> StepReport:
        """The failures known now that no report has listed."""
        report, self.unreported = self.unreported, StepReport()
        return report

    def _take_failures(self, waited: Sequence[SealCheck] = ()) -> None:
        """Fail the sequences that known checks and those in `waited` find; others are kept."""
        kept = []
        for check in self._checks:
            if not (check.is_known or check in waited):
                kept.append(check)
                continue
            for state, error in check.failed().items():
                if not state.removed:
                    state.fail(error)
                    self.unreported.failed[state.seq_id] = error
        self._checks = kept

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
        # with no basis even now, every due block has NaN or Inf and gets no page
        if bad is None or not self.basis.is_waiting:
            with self.timer:
                bad = self.encoders[group].seal(planes, exact, pages, first)
        return SealCheck(due, bad, group.layers)

    def _decide_basis(self, group: LayerGroup, exact: Tensor, first: Tensor) -> Tensor:
        """Decide the basis from the blocks without NaN or Inf, if there are any; returns `bad` of
        all blocks."""
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
        f"{side} of sequence {shown(seq_id)} has NaN or Inf in layer {layer}, head {head}, block "
        f"{block}: the model produced it; check its dtype (fp16 overflow) and its weights",
        block_index=block,
    )
