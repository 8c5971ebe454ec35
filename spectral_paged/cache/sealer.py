"""Turn blocks of the tail into pages: read, check, turn keys back, encode, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_paged.cache.cache_basis import CacheBasis
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.device import DeviceTimer, Download, upload
from spectral_paged.errors import NonFiniteError
from spectral_paged.kernels.math.rotary import stored_keys
from spectral_paged.kernels.ops import PageOps
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat, encode_pages

BLOCKS_AT_ONCE = 8  # bounds torch's fp32 working set; encoding is pure: batching changes no byte


class SealCheck:
    """Whether what was sealed held NaN or Inf.

    Args:
        failed: what is known at once.
        blocks: the blocks that a kernel checks, and how their `flags` `[N, L, H, 2]` are read.
    """

    def __init__(
        self,
        failed: dict[str, NonFiniteError],
        blocks: Sequence[tuple[str, int]] = (),
        flags: Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> None:
        self._failed = failed
        self._blocks = [([seq_id], block) for seq_id, block in blocks]  # who holds it, which
        self._flags = None if flags is None else Download(flags)
        self._layers = layers
        self.seq_ids = {seq_id for seq_id, _ in blocks} | set(failed)

    @property
    def is_known(self) -> bool:
        """True where `failed` has nothing to wait for."""
        return self._flags is None or self._flags.is_here

    def failed(self) -> dict[str, NonFiniteError]:
        """The first NaN or Inf of each sequence that has one; waits for the device."""
        if self._flags is None:
            return self._failed
        found = dict(self._failed)
        for index, layer, head, side in self._flags.get()[0].nonzero().tolist():
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
    """Encodes due blocks of a group in batches; pages are written but not shown yet.

    Args:
        basis: the cache's calibration, frozen here at the first seal where it is taken online.
        ops: what runs on the cache's device; its `seal` where that makes pages of the format.
        dtype: element type of exact pages.
    """

    def __init__(
        self, basis: CacheBasis, ops: PageOps, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.basis = basis
        self.ops = ops
        self.dtype = dtype
        self.timer = DeviceTimer(device)
        self._checks: list[SealCheck] = []

    @property
    def format(self) -> PageFormat:
        """The page format; an online calibration changes its fingerprint."""
        return self.basis.format

    def warm_up(self, group: LayerGroup) -> None:
        """Compile what seals, which takes seconds that a first seal would cost; nothing is
        written. An online calibration has yet to say what it is to do."""
        if self.basis.is_waiting or group.layout is None:
            return
        device = group.arena.planes.device
        if self.ops.seals(group.layout):
            exact, pages, first = (
                torch.zeros(shape, dtype=torch.int32, device=device)
                for shape in ((1, BLOCK_TOKENS // EXACT_PAGE_TOKENS), (1,), (1,))
            )
            self._by_kernel(group, exact, pages, first, compile_only=True)
        elif self.ops.on_gpu:
            heads, dim = self.format.num_kv_heads, self.format.head_dim
            block = torch.zeros(1, heads, BLOCK_TOKENS, dim, device=device)
            encode_pages(block, block, self.format, basis=self.basis.bound, layers=group.layers[:1])

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
        failed: dict[str, NonFiniteError] = {}
        if self.basis.is_waiting:
            self._freeze(group, due)
        # without a basis still, every block due has NaN or Inf, and is only to be refused
        assert group.layout is not None, "only groups with pages have blocks due"
        if not self.basis.is_waiting and self.ops.seals(group.layout):
            return self._encode_in_place(group, due)
        for start in range(0, len(due), BLOCKS_AT_ONCE):
            batch = [d for d in due[start : start + BLOCKS_AT_ONCE] if d[0] not in failed]
            self._encode_batch(group, batch, failed)
        return SealCheck(failed)

    def _encode_in_place(self, group: LayerGroup, batch: list[tuple[str, int]]) -> SealCheck:
        """By the seal kernel, which looks for NaN and Inf while it reads."""
        device = group.arena.planes.device
        places = [group.block_units(seq_id, block) for seq_id, block in batch]
        exact, pages, first = (
            upload(x, torch.int32, device)
            for x in (
                [place[0] for place in places],
                [place[1] for place in places],
                [self._first_token(block) for _, block in batch],
            )
        )
        bad = self._by_kernel(group, exact, pages, first)
        return SealCheck({}, batch, bad, group.layers)

    def _by_kernel(
        self, group: LayerGroup, exact: Tensor, pages: Tensor, first: Tensor, **options: bool
    ) -> Tensor:
        assert self.ops.seal is not None
        return self.ops.seal(
            group.arena.planes,
            exact,
            pages,
            first,
            layout=group.layout,
            dtype=self.dtype,
            cos=group.cos,
            sin=group.sin,
            **self.basis.projections(group.layers),
            **options,
        )

    def _encode_batch(
        self, group: LayerGroup, batch: list[tuple[str, int]], failed: dict[str, NonFiniteError]
    ) -> None:
        ready, keys, values = [], [], []
        for seq_id, block in batch:
            k, v = group.read_block(seq_id, block)
            error = self._find_non_finite(group, seq_id, block, k, v)
            if error is not None:
                failed[seq_id] = error
                continue
            assert group.layout is not None
            k = self._stored(group, k, block, group.layout.rope)
            ready.append((seq_id, block))
            keys.append(k)
            values.append(v)
        if not ready:
            return
        pages = encode_pages(
            torch.cat(keys),
            torch.cat(values),
            self.format,
            basis=self.basis.bound,
            layers=group.layers * len(ready),
        )
        for (seq_id, block), page in zip(ready, pages.split(len(group.layers)), strict=True):
            group.write_page(seq_id, block, page)

    def _freeze(self, group: LayerGroup, due: list[tuple[str, int]]) -> None:
        """Let the blocks `due` decide the basis; those with NaN or Inf are left out.

        Where no other is due nothing is decided: they fail, and no page is written.
        """
        accumulator, seen = self.basis.accumulator(), 0
        for seq_id, block in due:
            k, v = group.read_block(seq_id, block)
            if self._find_non_finite(group, seq_id, block, k, v) is None:
                turned = {f"k_{r}": self._stored(group, k, block, r) for r in ("pre", "frame")}
                accumulator.add(group.layers, k_post=k, v=v, **turned)
                seen += 1
        if seen:
            self.basis.freeze(accumulator)

    def _stored(self, group: LayerGroup, k: Tensor, block: int, rope: str) -> Tensor:
        """Keys of a block as pages with `rope` store them."""
        if group.rope is None or rope == "post":
            return k
        first = self._first_token(block)
        span = slice(first, first + BLOCK_TOKENS)
        return stored_keys(k, group.cos[span], group.sin[span], rope)

    def _first_token(self, block: int) -> int:
        return self.format.num_landmark_tokens + block * BLOCK_TOKENS

    def _find_non_finite(
        self, group: LayerGroup, seq_id: str, block: int, k: Tensor, v: Tensor
    ) -> NonFiniteError | None:
        """The first NaN or Inf by layer and head; k and v `[L, H, 512, D]`."""
        for side, x in (("K", k), ("V", v)):
            bad = ~torch.isfinite(x).flatten(2).all(dim=-1)
            if bool(bad.any()):
                layer, head = bad.nonzero()[0].tolist()
                return _non_finite(side, seq_id, group.layers[layer], head, block)
        return None


def _non_finite(side: str, seq_id: str, layer: int, head: int, block: int) -> NonFiniteError:
    return NonFiniteError(
        f"{side} of sequence {seq_id!r} has NaN or Inf in layer {layer}, head {head}, block "
        f"{block}: the model produced it; check its dtype (fp16 overflow) and its weights",
        block_index=block,
    )
