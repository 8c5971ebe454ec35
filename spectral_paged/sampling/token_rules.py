"""Biases, allowed tokens and bad words of requests, kept on the device and applied there.

A step sends neither rules nor histories to the device: rules are uploaded once, and the newest
tokens of a row are kept where they were sampled, before the host knows them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from spectral_paged.device import upload
from spectral_paged.sampling.params import SamplingParams
from spectral_paged.sampling.row_keys import RowKeys

NO_TOKEN = -1  # pads a bad word
UNKNOWN = -2  # pads the newest tokens; equal to none


class TokenRules:
    """Tables of what each request with such parameters adds to logits, and of its newest tokens.

    ```
    bias    float32 [rows, vocab]         -inf: the token is never sampled
    words   int32   [rows, words, width]  bad words of several tokens, their last token first
    newest  int32   [rows, width]         newest output tokens, the last one first
    ```

    A word is as wide as its tokens, so one more token is kept than is compared: a step may be
    taken back. A request holds a row from its first sampled token until it ends or is preempted.
    """

    def __init__(self) -> None:
        self._keys = RowKeys()
        self._bias: Tensor | None = None
        self._words: Tensor | None = None
        self._newest: Tensor | None = None
        self._with_words: set[int] = set()  # rows that have bad words of several tokens

    def stats(self) -> dict[str, object]:
        """Rows that requests hold now, and the bytes of the tables on the device."""
        tables = (self._bias, self._words, self._newest)
        num_bytes = sum(0 if table is None else table.nbytes for table in tables)
        return {"token_rule_rows": len(self._keys), "token_rule_bytes": num_bytes}

    def hold(
        self,
        key: Hashable,
        params: SamplingParams,
        bad_words: Sequence[Sequence[int]],
        output: Sequence[int],
        logits: Tensor,
        *,
        siblings: Iterable[Hashable] = (),
    ) -> int:
        """Return the row of `key`; a new one gets the rules and the newest of the tokens so far.

        Args:
            bad_words: token ids of each.
            output: all sampled tokens of a new row.
            logits: the tables have their device and their width.
            siblings: keys with the same rules, which are copied from the row of one of them.
        """
        row = self._keys.get(key)
        if row is not None:
            return row
        words = [word for word in bad_words if len(word) > 1]
        self._grow(logits, len(words), max(map(len, words), default=0))
        assert self._bias is not None and self._words is not None and self._newest is not None
        row, like = self._keys.next_row, self._keys.first_of(siblings)
        if like is not None:
            self._bias[row] = self._bias[like]
            self._words[row] = self._words[like]
        else:
            self._write_bias(self._bias[row], params, [w[0] for w in bad_words if len(w) == 1])
            self._write_words(self._words[row], words)
        newest = list(output)[: -self._newest.shape[1] - 1 : -1]
        self._newest[row] = UNKNOWN
        if newest and words:
            found = upload(newest, torch.int32, logits.device)
            self._newest[row, : len(newest)] = found
        if words:
            self._with_words.add(row)
        return self._keys.take(key)

    def _grow(self, logits: Tensor, num_words: int, width: int) -> None:
        """Make the tables as large as one more row with such words needs."""
        have = (0, 0, 0) if self._words is None else tuple(self._words.shape)
        rows, words, wide = self._keys.num_wanted, max(have[1], num_words), max(have[2], width)
        if (rows, words, wide) == have:
            return
        # a caller's inference mode may end before a later step writes to the tables
        with torch.inference_mode(False):
            device = logits.device
            bias = self._bias
            if rows != have[0]:
                bias = torch.zeros(rows, logits.shape[-1], device=device)
            table = torch.full((rows, words, wide), NO_TOKEN, dtype=torch.int32, device=device)
            newest = torch.full((rows, wide), UNKNOWN, dtype=torch.int32, device=device)
            if self._bias is not None and self._words is not None and self._newest is not None:
                assert bias is not None
                if bias is not self._bias:
                    bias[: have[0]] = self._bias
                table[: have[0], : have[1], : have[2]] = self._words
                newest[: have[0], : have[2]] = self._newest
        self._bias, self._words, self._newest = bias, table, newest
        self._keys.add_rows(rows)

    @staticmethod
    def _write_bias(line: Tensor, params: SamplingParams, never: Sequence[int]) -> None:
        line.zero_()
        if params.allowed_token_ids is not None:
            line.fill_(float("-inf"))
            line.index_fill_(0, upload(params.allowed_token_ids, torch.long, line.device), 0)
        if params.logit_bias:
            ids = upload(list(params.logit_bias), torch.long, line.device)
            line.index_add_(
                0, ids, upload(list(params.logit_bias.values()), line.dtype, line.device)
            )
        if never:
            line.index_fill_(0, upload(never, torch.long, line.device), float("-inf"))

    @staticmethod
    def _write_words(lines: Tensor, words: Sequence[Sequence[int]]) -> None:
        lines.fill_(NO_TOKEN)
        if words:
            wide = lines.shape[1]
            padded = [[*reversed(word)] + [NO_TOKEN] * (wide - len(word)) for word in words]
            lines[: len(words)] = upload(padded, lines.dtype, lines.device)

    def release(self, key: Hashable) -> None:
        """Free the row of `key`, if it holds one."""
        row = self._keys.release(key)
        if row is not None:
            self._with_words.discard(row)

    def count(self, rows: Sequence[int], ids: Tensor, times: int = 1) -> None:
        """Note the sampled token `ids[i]` of `rows[i]`; -1 times takes it back."""
        assert self._newest is not None
        if self._with_words.isdisjoint(rows):
            return
        places = upload(rows, torch.long, ids.device)
        newest = self._newest[places]
        if times > 0:
            moved = torch.cat([ids.to(newest.dtype).unsqueeze(-1), newest[:, :-1]], dim=-1)
        else:
            moved = torch.cat([newest[:, 1:], torch.full_like(newest[:, :1], UNKNOWN)], dim=-1)
        self._newest[places] = moved

    def apply(
        self, logits: Tensor, rows: Sequence[int], drafted: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """Return `logits` `[N, vocab]` under the rules of `rows`, one for each line.

        Args:
            drafted: further output tokens of each line, which the table has not; empty: none.
        """
        assert self._bias is not None and self._words is not None and self._newest is not None
        places = upload(rows, torch.long, logits.device)
        logits = logits + self._bias[places]
        if self._with_words.isdisjoint(rows):
            return logits
        words = self._words[places]
        newest = self._newest[places]
        if any(drafted):
            newest = _behind(newest, drafted)
        before = newest[:, None, :-1]
        behind = ((words[..., 1:] == before) | (words[..., 1:] == NO_TOKEN)).all(dim=-1)
        last = words[..., 0]
        bad = behind & (last != NO_TOKEN)
        worst = torch.full_like(last, float("inf"), dtype=logits.dtype)
        worst.masked_fill_(bad, float("-inf"))
        return logits.scatter_reduce(-1, last.clamp(min=0).long(), worst, "amin")


def _behind(newest: Tensor, drafted: Sequence[Sequence[int]]) -> Tensor:
    """The newest tokens `[N, width]`, the last one first, once those of `drafted` have come."""
    most = max(map(len, drafted))
    padded = [[*[UNKNOWN] * (most - len(tokens)), *reversed(tokens)] for tokens in drafted]
    both = torch.cat([upload(padded, newest.dtype, newest.device), newest], dim=-1)
    first = upload([most - len(tokens) for tokens in drafted], torch.long, newest.device)
    columns = first.unsqueeze(-1) + torch.arange(newest.shape[-1], device=newest.device)
    return both.gather(-1, columns)
