"""A plain cache that stores every token and attends by the written rule, without pools."""

from __future__ import annotations

from itertools import groupby

import torch

from spectral_paged.cache import Visibility
from spectral_paged.kernels.math.rotary import read_keys, stored_keys
from spectral_paged.pages import decode_pages, encode_pages


class PlainCache:
    """All tokens of one sequence in one layer, in fp32, without pools, tables or batching."""

    def __init__(self, fmt, rope, num_prompt_tokens, scale, basis=None, layer=0, pins=()):
        self.fmt, self.rope, self.prompt, self.scale = fmt, rope, num_prompt_tokens, scale
        self.k = torch.zeros(0, fmt.num_kv_heads, fmt.head_dim)
        self.v = torch.zeros(0, fmt.num_kv_heads, fmt.head_dim)
        self.pinned_tokens = {t for start, end in pins for t in range(start, end)}
        self.sealed = {}
        self.calibrated = {} if basis is None else {"basis": basis, "layers": [layer]}

    def _block(self, b):
        """K and V of block b as a query sees it through its page, [512, H, D]."""
        if b not in self.sealed:
            start = self.fmt.num_landmark_tokens + 512 * b
            span = torch.arange(start, start + 512)
            k, v = self.k[span].float(), self.v[span].float()
            cos, sin = self.rope.rows(span)
            k, v = (x.transpose(0, 1)[None] for x in (k, v))
            cos, sin = (x.transpose(0, 1) for x in (cos, sin))
            k = stored_keys(k, cos, sin, self.fmt.rope)
            page = encode_pages(k, v, self.fmt, **self.calibrated)
            k, v = decode_pages(page, self.fmt, **self.calibrated)
            k = read_keys(k, cos, sin, self.fmt.rope)
            k, v = (x[0].transpose(0, 1) for x in (k, v))
            self.sealed[b] = (k, v)
        return self.sealed[b]

    def shown_blocks(self, t):
        """Blocks that the query at `t` sees as pages: no pinned token lies in them."""
        for b in range(Visibility.of(self.fmt).visible_blocks(t, self.prompt)):
            start = self.fmt.num_landmark_tokens + 512 * b
            if self.pinned_tokens.isdisjoint(range(start, start + 512)):
                yield b

    def attend(self, q, k, v):
        """Append [T, H, D] and return the queries' outputs [T, Hq, D].

        Queries that see the same blocks as pages are computed together, up to 256 of them.
        """
        start, group = self.k.shape[0], q.shape[1] // self.fmt.num_kv_heads
        self.k, self.v = torch.cat((self.k, k)), torch.cat((self.v, v))
        outs = []
        for (blocks, _), run in groupby(
            range(start, self.k.shape[0]), lambda t: (tuple(self.shown_blocks(t)), t // 256)
        ):
            at = torch.tensor(list(run))
            end = int(at[-1]) + 1
            keys, values = self.k[:end].float().clone(), self.v[:end].float().clone()
            for b in blocks:
                first = self.fmt.num_landmark_tokens + 512 * b
                keys[first : first + 512], values[first : first + 512] = self._block(b)
            keys = keys.repeat_interleave(group, dim=1)
            values = values.repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,thd->hqt", q[at - start].float(), keys) * self.scale
            scores.masked_fill_(torch.arange(end) > at[:, None], float("-inf"))
            outs.append(torch.einsum("hqt,thd->qhd", torch.softmax(scores, -1), values))
        return torch.cat(outs)
