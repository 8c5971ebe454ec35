"""The rows of a padded batch as sequences of a cache, for every `generate` that runs over one.

```
batches = RowBatches(cache, remedies)         one for a cache
rows = batches.new(4)                         nothing is stored yet
padded = rows.read(width, attention_mask=...) which columns of a forward hold tokens
with rows.step({row: num_tokens, ...}):       a step of the cache; a forward is one or several
    cache.attend(...)
rows.num_columns += width
rows.take(beam_idx)                           beams: rows become copies of rows
```

A step that fails before its end leaves the rows where they stood. One that fails at its end, and
copies that do not fit, give the whole batch up: its rows would differ in length.
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
    """How the messages of refusals end: what the caller of an integration can do.

    tokens: where new tokens do not fit.
    copies: where copies of rows do not fit.
    sequences: where the cache holds as many sequences as it can.
    failed: where rows were given up.
    """

    tokens: str
    copies: str
    sequences: str
    failed: str


class RowBatches:
    """The batches over one cache.

    Frees the rows of batches that nobody holds any more, and keeps failures that were found late
    for the batch they belong to.

    Attributes:
        cache: where the rows are stored. Batches reach it through here, so that its memory is free
            once it is deleted here, although batches are still held.
        released: sequences of batches that nobody holds any more; the next `collect` frees them.
    """

    def __init__(self, cache: SpectralKVCache, remedies: Remedies) -> None:
        self.cache = cache
        self.remedies = remedies
        self._names = (f"row {number}" for number in itertools.count())
        self.released: list[str] = []
        self._failed: dict[str, NonFiniteError] = {}

    def new(self, num_rows: int) -> RowBatch:
        """A batch of which nothing is stored."""
        return RowBatch(self, [self.new_name() for _ in range(num_rows)])

    def new_name(self) -> str:
        """Name of a sequence, never used before in this cache."""
        return next(self._names)

    def collect(self) -> None:
        """Free the sequences of batches that nobody holds any more; their failures are kept for
        `settle`, because they are no error of the batch that comes next."""
        if self.released:
            self._failed |= self.cache.settle().failed
        while self.released:
            seq_id = self.released.pop()
            if seq_id in self.cache:
                self.cache.free(seq_id)

    def settle(self) -> None:
        """Wait for the checks of all that was sealed. On CUDA those of a step are known after it,
        and read by the next step; after the last one nothing else would read them.

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
            NonFiniteError: NaN or Inf in what was sealed of `seq_ids`.
        """
        self._failed |= self.cache.end_step().failed
        self.raise_failures(seq_ids)

    def raise_failures(self, seq_ids: Sequence[str]) -> None:
        """Raise the first failure of `seq_ids` that was found; the others of them are dropped."""
        if self._failed:
            found = [self._failed.pop(s) for s in seq_ids if s in self._failed]
            for error in found:
                raise error


class RowBatch:
    """The sequences of one batch; made by `RowBatches.new`.

    Attributes:
        seq_ids: sequence of each row; the list stays the same object.
        num_columns: columns of the padded batch that are stored; its owner counts forwards.
        is_whole: False once the batch was given up.
    """

    def __init__(self, batches: RowBatches, seq_ids: list[str]) -> None:
        self._batches = batches
        self.seq_ids = seq_ids
        self.num_columns = 0
        self.is_whole = True
        # garbage is collected at any moment, inside a step too: noted here, freed by `collect`
        self._release = weakref.finalize(self, batches.released.extend, seq_ids)

    def __len__(self) -> int:
        return len(self.seq_ids)

    def num_tokens(self) -> list[int]:
        """Tokens stored of each row; 0 where it has had none yet."""
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
        """Add every row to the cache, for prompts that take several steps. Without it the first
        tokens of a row are its whole prompt.

        Raises:
            CapacityError: the cache holds too many sequences; rows before are added.
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
        """`begin_step` before what runs inside, and `end_step` or `abort_step` after it."""
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
            CapacityError: they do not fit, or a row grows too long; nothing is held.
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
        """Forget the open step, if there is one: rows stand where they stood before it."""
        self._batches.cache.abort_step()

    def end_step(self) -> None:
        """Store the step's tokens and seal what is due.

        Raises:
            NonFiniteError: NaN or Inf in what was sealed, on CUDA by an earlier step; the batch is
                given up.
        """
        try:
            with without_autocast(self._batches.cache.device):
                self._batches.end_step(self.seq_ids)
        except BaseException:  # its tokens count as stored, but the caller does not hear of it
            self.give_up()
            raise

    # ---- rows ----------------------------------------------------------------------------

    def take(self, sources: Sequence[int]) -> None:
        """Rows become copies of rows `sources`: the first copy is the row itself, others fork and
        share full pages.

        Raises:
            CapacityError: no room for what copies do not share; the batch is given up.
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
        """Free all rows now: an error may be held for long, and with its frames this object."""
        self.is_whole = False
        self._release.detach()
        cache = self._batches.cache
        for seq_id in self.seq_ids:
            if seq_id in cache:
                cache.free(seq_id)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Pages are computed in fp32; a `generate` under autocast would round inside."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
