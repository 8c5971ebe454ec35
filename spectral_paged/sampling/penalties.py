"""Penalties lower the logits of tokens that a request has had, which are counted on the device.

A step sends no histories to the device: prompts are uploaded once, and sampled tokens are counted
where they were sampled, before the host knows them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from spectral_paged.device import upload
from spectral_paged.sampling.params import SamplingParams
from spectral_paged.sampling.row_keys import RowKeys


class Penalties:
    """A table of the tokens that each request with penalties has had so far.

    ```
    int32 [rows, vocab]    2 * (times in the output) + (1 if the prompt has it)
    ```

    A request holds a row from its first sampled token until it ends or is preempted. The table is
    allocated for the first such request, and doubles when every row is taken.
    """

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._keys = RowKeys()

    def stats(self) -> dict[str, object]:
        """Rows that requests hold now, and the bytes of the table on the device."""
        num_bytes = 0 if self._table is None else self._table.nbytes
        return {"penalty_rows": len(self._keys), "penalty_bytes": num_bytes}

    def hold(
        self,
        key: Hashable,
        prompt: Sequence[int],
        output: Sequence[int],
        logits: Tensor,
        *,
        siblings: Iterable[Hashable] = (),
    ) -> int:
        """Return the row of `key`; a new one counts the tokens so far.

        Args:
            prompt, output: the tokens of a new row, all of its sampled ones.
            logits: the table has their device and their width.
            siblings: keys with the same prompt, which is copied from the row of one of them.
        """
        row = self._keys.get(key)
        if row is not None:
            return row
        if self._keys.num_wanted != self._keys.num_rows:
            self._grow(logits)
        assert self._table is not None
        row = self._keys.next_row
        line = self._table[row].zero_()
        if prompt:
            like = self._keys.first_of(siblings)
            if like is None:
                line.index_fill_(0, upload(prompt, torch.long, line.device), 1)
            else:
                line.copy_(self._table[like] & 1)
        if output:
            ids = upload(output, torch.long, line.device)
            line.index_add_(0, ids, torch.ones_like(ids, dtype=line.dtype), alpha=2)
        return self._keys.take(key)

    def _grow(self, logits: Tensor) -> None:
        num_rows, wanted = self._keys.num_rows, self._keys.num_wanted
        # a caller's inference mode may end before a later step writes to the table
        with torch.inference_mode(False):
            table = torch.zeros(wanted, logits.shape[-1], dtype=torch.int32, device=logits.device)
            if self._table is not None:
                table[:num_rows] = self._table
        self._table = table
        self._keys.add_rows(wanted)

    def release(self, key: Hashable) -> None:
        """Free the row of `key`, if it holds one."""
        self._keys.release(key)

    def count(self, rows: Sequence[int], ids: Tensor, times: int = 1) -> None:
        """Count the sampled token `ids[i]` for `rows[i]`; -1 times takes it back."""
        assert self._table is not None
        places = upload(rows, torch.long, ids.device) * self._table.shape[-1] + ids
        once = torch.ones_like(ids, dtype=self._table.dtype)
        self._table.view(-1).index_add_(0, places, once, alpha=2 * times)

    def apply(
        self,
        logits: Tensor,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        drafted: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """Return `logits` `[N, vocab]` with repetition, presence and frequency penalties applied.

        Args:
            rows, params: the row and the penalties of each row of `logits`.
            drafted: further output tokens of each row, which the table has not; empty: none.
        """
        assert self._table is not None
        device = logits.device

        def column(name: str) -> Tensor:
            values = [float(getattr(p, name)) for p in params]
            return upload(values, torch.float32, device).unsqueeze(-1)

        had = self._table[upload(rows, torch.long, device)]
        further = [(line, token) for line, tokens in enumerate(drafted) for token in tokens]
        if further:
            places = upload(further, torch.long, device).T
            once = torch.full_like(places[0], 2, dtype=had.dtype)
            had.index_put_((places[0], places[1]), once, accumulate=True)
        counts = had >> 1
        factor = column("repetition_penalty")
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(had > 0, repeated, logits)
        once = column("presence_penalty") * (counts > 0)
        return logits - once - column("frequency_penalty") * counts
