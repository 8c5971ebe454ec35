"""The rows of a padded batch as sequences of a cache, for integrations of `generate`.

```
batches = RowBatches(cache, remedies)         one for a cache
rows = batches.new(4)                         nothing is stored yet
padded = rows.read(width, attention_mask=...) which columns of a forward hold tokens
with rows.step({row: num_tokens, ...}):       a step of the cache; a forward is one or several
    cache.attend(...)
rows.num_columns += width
rows.take(beam_idx)                           beams: rows become copies of rows
```

After a step that fails before its end, the rows have the tokens they had before it. If a step fails
at its end, or copies do not fit, the batch is given up, because its rows would differ in length.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.cache import SpectralKVCache
from spectral_paged.errors import CapacityError, InvalidRequestError, NonFiniteError
from spectral_paged.integrations.padded_rows import PaddedRows


@dataclass(frozen=True, slots=True)
class Remedies:
    """The ends of error messages, which name what the caller of an integration can do.

    tokens: new tokens do not fit.
    copies: copies of rows do not fit.
    sequences: the cache has as many sequences as it can.
    failed: the rows were given up.
    """

    tokens: str
    copies: str
    sequences: str
    failed: str


class RowBatches:
    """The batches over one cache.

    It frees the rows of batches that were garbage-collected, and keeps failures that are found late
    for the batches to which they belong.

    Attributes:
        cache: stores the rows. Batches reach it only through this attribute, so that deleting the
            attribute frees its memory although batches are still alive.
        released: sequences of garbage-collected batches, which the next `collect` frees.
    """

    def __init__(self, cache: SpectralKVCache, remedies: Remedies) -> None:
        self.cache = cache
        self.remedies = remedies
        self._names = (f"row {number}" for number in itertools.count())
        self.released: list[str] = []
        self._failed: dict[str, NonFiniteError] = {}

    def new(self, num_rows: int) -> RowBatch:
        """A new batch, none of whose tokens are stored yet."""
        return RowBatch(self, [self.new_name() for _ in range(num_rows)])

    def new_name(self) -> str:
        """The name of a new sequence, never used before in this cache."""
        return next(self._names)

    def collect(self) -> None:
        """Free the sequences of garbage-collected batches.

        Their failures are kept for `settle`, because they are not errors of the next batch.
        """
        if self.released:
            self._failed |= self.cache.settle().failed
        while self.released:
            seq_id = self.released.pop()
            if seq_id in self.cache:
                self.cache.free(seq_id)

    def settle(self) -> None:
        """Wait for the checks of all sealed blocks.

        On CUDA the checks of a step end after it, and the next step reads them. After the last step
        only this method does.

        Raises:
            NonFiniteError: NaN or Inf that no step has reported; raised once.
        """
        self.collect()
        found = self._failed | self.cache.settle().failed
        self._failed = {}
        for error in found.values():
            raise error

    def end_step(self, seq_ids: Sequence[str]) -> None:
        """End the cache's step; failures of other batches wait for their own next step.

        Raises:
            NonFiniteError: a sealed block of `seq_ids` has NaN or Inf.
        """
        self._failed |= self.cache.end_step().failed
        self.raise_failures(seq_ids)

    def raise_failures(self, seq_ids: Sequence[str]) -> None:
        """Raise the first failure found in `seq_ids`, and drop the others of `seq_ids`."""
        if self._failed:
            found = [self._failed.pop(s) for s in seq_ids if s in self._failed]
            for error in found:
                raise error


class RowBatch:
    """The sequences of one batch; made by `RowBatches.new`.

    Attributes:
        seq_ids: sequence of each row; the list stays the same object.
        num_columns: stored columns of the padded batch; its owner adds those of each forward.
        is_whole: False once the batch was given up.
    """

    def __init__(self, batches: RowBatches, seq_ids: list[str]) -> None:
        self._batches = batches
        self.seq_ids = seq_ids
        self.num_columns = 0
        self.is_whole = True
        # garbage collection may run inside a step, so rows are only noted here; `collect` frees
        self._release = weakref.finalize(self, batches.released.extend, seq_ids)

    def __len__(self) -> int:
        return len(self.seq_ids)

    def num_tokens(self) -> list[int]:
        """The number of stored tokens of each row; 0 before its first."""
        cache = self._batches.cache
        return [cache.num_tokens(s) if s in cache else 0 for s in self.seq_ids]

    def read(
        self, width: int, *, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> PaddedRows:
        """The next `width` columns of the batch; see `PaddedRows.of`."""
        return PaddedRows.of(
            len(self),
            width,
            self.num_tokens(),
            self.num_columns,
            attention_mask=attention_mask,
            position_ids=position_ids,
            device=self._batches.cache.device,
        )

    def check_whole(self) -> None:
        """Raise InvalidRequestError if the batch was given up."""
        if not self.is_whole:
            raise InvalidRequestError(
                f"a forward over these rows failed half way: {self._batches.remedies.failed}"
            )

    # ---- steps ---------------------------------------------------------------------------

    def open(self, num_prompt_tokens: Sequence[int]) -> None:
        """Add every row to the cache, for prompts that take several steps.

        Without this call, the tokens of a row's first step are its whole prompt.

        Raises:
            CapacityError: the cache has too many sequences; the rows before are added.
        """
        cache = self._batches.cache
        for seq_id, count in zip(self.seq_ids, num_prompt_tokens, strict=True):
            if cache.add_sequence(seq_id, num_prompt_tokens=count) is None:
                raise CapacityError(
                    f"a batch of {len(self)} rows does not fit: the cache holds "
                    f"{cache.max_num_seqs} sequences at a time; {self._batches.remedies.sequences}"
                )

    @contextmanager
    def step(self, num_new: Mapping[int, int]) -> Iterator[None]:
        """Run a `with` block between `begin_step` and `end_step`, or `abort_step` if it raises."""
        self.begin_step(num_new)
        try:
            yield
        except BaseException:
            self.abort_step()
            raise
        self.end_step()

    def begin_step(self, num_new: Mapping[int, int]) -> None:
        """Open a step of the cache in which row `r` gets `num_new[r]` tokens.

        Raises:
            CapacityError: the tokens do not fit, or a row grows too long; no slots stay reserved.
            NonFiniteError: NaN or Inf in an earlier step; the batch is given up.
        """
        cache = self._batches.cache
        try:
            self._batches.raise_failures(self.seq_ids)
        except NonFiniteError:
            self.give_up()
            raise
        new_tokens = {self.seq_ids[row]: count for row, count in num_new.items()}
        plan = cache.reserve(new_tokens)
        if plan is None:
            raise CapacityError(
                f"{sum(new_tokens.values())} more tokens in {len(new_tokens)} rows do not fit "
                f"beside {sum(self.num_tokens())} that are stored; the pool holds "
                f"{cache.capacity_tokens} tokens in all: {self._batches.remedies.tokens}"
            )
        try:
            with without_autocast(cache.device):
                cache.begin_step(plan)
        except BaseException:
            self.abort_step()
            for seq_id in new_tokens:  # where no step was open yet
                cache.cancel_reservation(seq_id)
            raise

    def abort_step(self) -> None:
        """Drop the open step, if there is one: rows have the tokens they had before it."""
        self._batches.cache.abort_step()

    def end_step(self) -> None:
        """Store the step's tokens and seal the blocks that are due.

        Raises:
            NonFiniteError: a sealed block has NaN or Inf, on CUDA one of an earlier step; the batch
                is given up.
        """
        try:
            with without_autocast(self._batches.cache.device):
                self._batches.end_step(self.seq_ids)
        except BaseException:  # its tokens count as stored, but the caller does not count them
            self.give_up()
            raise

    # ---- rows ----------------------------------------------------------------------------

    def take(self, sources: Sequence[int]) -> None:
        """Replace the rows by copies of rows `sources`.

        The first copy of a row is the row itself. Others fork it and share its full pages.

        Raises:
            CapacityError: the unshared tokens of copies do not fit; the batch is given up.
            InvalidRequestError: the batch was given up before.
        """
        self.check_whole()
        cache, old, used = self._batches.cache, list(self.seq_ids), set(sources)
        for row, seq_id in enumerate(old):
            if row not in used and seq_id in cache:
                cache.free(seq_id)
        self.seq_ids[:] = [seq_id for row, seq_id in enumerate(old) if row in used]
        taken: list[str] = []
        for source in sources:
            seq_id = old[source]
            if seq_id in taken:
                seq_id = self._batches.new_name()
                if old[source] in cache and not cache.fork(old[source], seq_id):
                    self.give_up()
                    raise CapacityError(
                        f"no room for the unshared tokens of {len(sources)} rows; "
                        f"{self._batches.remedies.copies}"
                    )
                self.seq_ids.append(seq_id)
            taken.append(seq_id)
        self.seq_ids[:] = taken

    def give_up(self) -> None:
        """Free all rows now, because the frames of an error may keep this object alive for long."""
        self.is_whole = False
        self._release.detach()
        cache = self._batches.cache
        for seq_id in self.seq_ids:
            if seq_id in cache:
                cache.free(seq_id)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, which would round the fp32 in which pages are computed."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
