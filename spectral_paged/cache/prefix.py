"""Hash chains over token ids, one link for every 64 tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS


class PrefixChain:
    """The digests of a sequence's full spans of 64 tokens, each over the whole prefix.

    A span's K and V depend on the pages that its queries saw: prompt tokens see by segment,
    generated tokens by position. The digest of a span with generated tokens therefore contains the
    prompt's length: a resumed request finds the span, another prompt does not (decision 0003).

    Args:
        root: fingerprint of the format, and anything else that must separate prefixes.
        num_prompt_tokens: position of the first generated token.
        generated_differ: False if a token's view is the same in prompt and output (`exact`).
    """

    def __init__(self, root: str, num_prompt_tokens: int, *, generated_differ: bool) -> None:
        self._digests: list[bytes] = []
        self._root = root.encode()
        self._num_prompt_tokens = num_prompt_tokens
        self._generated_differ = generated_differ

    def extend(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Add the digests of full spans among the first `num_tokens` of `token_ids`."""
        for i in range(len(self._digests), num_tokens // EXACT_PAGE_TOKENS):
            start, end = i * EXACT_PAGE_TOKENS, (i + 1) * EXACT_PAGE_TOKENS
            digest = hashlib.sha256(self._digests[-1] if self._digests else self._root)
            digest.update(np.asarray(token_ids[start:end], dtype=np.int64).tobytes())
            if self._generated_differ and end > self._num_prompt_tokens:
                digest.update(b"generated after %d" % self._num_prompt_tokens)
            self._digests.append(digest.digest())

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, index: int) -> bytes:
        return self._digests[index]
