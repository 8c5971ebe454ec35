"""Hash chains over token ids, one link for every 64 tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS


class PrefixChain:
    """Digests of a sequence's full 64-token spans; each covers everything before it.

    A span's K and V depend on what its queries saw. Prompt tokens see by segment, generated tokens
    by position (DESIGN of the format), so a span that holds generated tokens also carries the
    prompt's length in its digest: a resumed request finds it, another prompt does not.

    Args:
        root: fingerprint of the format (and anything else that must separate caches).
        num_prompt_tokens: where generated tokens begin.
        generated_differ: False where a token's view is the same in prompt and output (`exact`).
    """

    def __init__(self, root: str, num_prompt_tokens: int, *, generated_differ: bool) -> None:
        self._digests: list[bytes] = []
        self._root = root.encode()
        self._num_prompt_tokens = num_prompt_tokens
        self._generated_differ = generated_differ

    def extend(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Hash the full spans among the first `num_tokens` of `token_ids`."""
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
