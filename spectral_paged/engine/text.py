"""Text of a growing completion: incremental detokenization and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class OutputText:
    """Decodes a completion token by token and cuts its text at the first stop string.

    Args:
        tokenizer: a fast transformers tokenizer; None: the text stays empty.
        stop: strings that end the completion.
    """

    def __init__(
        self, tokenizer: Any, *, stop: Sequence[str] = (), skip_special_tokens: bool = True
    ) -> None:
        self._backend = tokenizer.backend_tokenizer if tokenizer is not None else None
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self.text = ""

    def append(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Add a token and return the stop string that ends the text with it, or None."""
        if self._backend is None:
            return None
        before = len(self.text)
        self.text += self._stream.step(self._backend, token_id) or ""
        if not may_stop:
            return None
        # only hits that this token completes: earlier ones came before `min_tokens`
        hits = [(self.text.find(s, max(0, before - len(s) + 1)), s) for s in self._stop]
        hits = [(at, s) for at, s in hits if at >= 0]
        if not hits:
            return None
        at, stop = min(hits)
        self.text = self.text[:at]
        return stop

    def settled(self) -> str:
        """Return the text that no later stop string can remove."""
        for length in range(max((len(s) for s in self._stop), default=1) - 1, 0, -1):
            tail = self.text[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return self.text[: -len(tail)]
        return self.text
