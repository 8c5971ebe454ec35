"""The prompt that a completion's text begins with, if its request asks for an echo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectral_paged.errors import InvalidRequestError
from spectral_paged.llm import LLM
from spectral_paged.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Echo:
    """One prompt's text, and its tokens if the request asks for log-probabilities too.

    offsets: the place of each token in the text.
    first: the text of the first token, which has no log-probability.
    """

    text: str
    token_ids: Sequence[int] = ()
    offsets: Sequence[int] = ()
    first: str = ""

    @classmethod
    def of(
        cls, llm: LLM, prompt: str | Sequence[int], token_ids: Sequence[int], params: SamplingParams
    ) -> Echo:
        """Return the echo of a prompt, which its completion's text goes on from.

        Args:
            token_ids: of the prompt.

        Raises:
            InvalidRequestError: there is no tokenizer.
        """
        tokens, skip = llm.engine.token_bytes, params.skip_special_tokens
        if tokens is None:
            if isinstance(prompt, str) and params.prompt_logprobs is None:
                return cls(prompt)
            raise InvalidRequestError("echo of token ids needs a tokenizer; send text")
        if isinstance(prompt, str) and params.truncate_prompt_tokens is None:
            text = prompt
        else:
            text = tokens.text(token_ids, skip_special_tokens=skip)
        if params.prompt_logprobs is None:
            return cls(text)
        places = tokens.places(token_ids, skip_special_tokens=skip)
        # tokenizers that change a text, such as its case or its spaces, may give a longer one back
        offsets = [min(place, len(text)) for place in places]
        first = tokens.of(token_ids[0], None).decode("utf-8", "replace")
        return cls(text, token_ids, offsets, first)
