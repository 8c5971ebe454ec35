"""Prompts and conversations become token ids, the same way for every caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Unpack

from spectral_paged.engine.admission import prompt_too_long
from spectral_paged.engine.chat_template import ChatOptions, ChatTemplate
from spectral_paged.engine.control_tokens import ControlTokens
from spectral_paged.engine.messages import check_messages
from spectral_paged.engine.text_bound import TextBound, text_bound
from spectral_paged.errors import InvalidRequestError, cut, refusal, shown
from spectral_paged.sampling import plain_list


class PromptEncoder:
    """Encodes prompts and conversations for one model.

    A text that has more characters than `max_model_len` tokens could stand for is refused before it
    is tokenized, which takes about a second for a megabyte.

    Args:
        tokenizer: of transformers; None: prompts are token ids.
        vocab_size: the number of tokens that the model has rows for; None: any.
        max_model_len: the most tokens of a sequence.
        end_tokens: ids that end a completion.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int | None,
        max_model_len: int,
        end_tokens: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._control_tokens = ControlTokens(tokenizer, end_tokens)

    def encode(
        self,
        prompt: str | Sequence[int],
        *,
        truncate_prompt_tokens: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Return the token ids of a prompt that is text, special tokens included, or token ids.

        Args:
            truncate_prompt_tokens: keep so many of its last tokens, -1: as many as fit.
            add_special_tokens: those that the tokenizer puts around a text.

        Raises:
            InvalidRequestError: there is no tokenizer for text, the text is not valid Unicode, the
                tokenizer refuses it, or an element is no token id of this vocabulary.
            PromptTooLongError: it cannot fit.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt, truncate_prompt_tokens, add_special_tokens)
        token_ids = plain_list(prompt, "prompt")
        if token_ids is None:
            raise InvalidRequestError(f"a prompt is text or token ids; got {shown(prompt)}")
        token_ids = self._end_of(token_ids, truncate_prompt_tokens)
        if len(token_ids) >= self._max_model_len:  # before each of millions is looked at
            raise prompt_too_long(f"{len(token_ids)}", self._max_model_len)
        for token in token_ids:
            if isinstance(token, list | tuple):
                raise InvalidRequestError(
                    f"prompt token {shown(token)} is a list: a prompt has one dimension, so give "
                    "its rows as prompts (those of an array: .tolist())"
                )
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise InvalidRequestError(f"prompt token {shown(token)} is not a token id")
        return self._in_vocabulary(token_ids)

    def _end_of(self, token_ids: list[int], truncate_prompt_tokens: int | None) -> list[int]:
        """Return the last tokens of a prompt, all of them without a limit."""
        if truncate_prompt_tokens is None:
            return token_ids
        most = self._max_model_len - 1 if truncate_prompt_tokens == -1 else truncate_prompt_tokens
        return token_ids[-most:]

    def _encode_text(
        self, text: str, truncate_prompt_tokens: int | None, add_special_tokens: bool
    ) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError("a text prompt needs a tokenizer; pass token ids")
        self._check(text, any_length=truncate_prompt_tokens is not None)
        try:
            options = {} if add_special_tokens else {"add_special_tokens": False}
            token_ids = list(self.tokenizer(text, **options)["input_ids"]) if text else []
        except Exception as error:  # of any type, and must end no other request
            raise InvalidRequestError(
                f"the tokenizer refuses the prompt: {shown(error)}"
            ) from error
        return self._in_vocabulary(self._end_of(token_ids, truncate_prompt_tokens))

    def encode_chat(
        self,
        messages: object,
        *,
        allow_special_tokens: bool = False,
        truncate_prompt_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """Return the token ids of a conversation, up to the start of the assistant's turn.

        Args:
            options: the fields of `ChatTemplate`.
            allow_special_tokens: special tokens in the text of messages are tokens; else they are
                text, and the template's are the only ones.
            truncate_prompt_tokens: as in `encode`.

        Raises:
            InvalidRequestError: the messages are none, the template refuses them, or there is no
                template.
            PromptTooLongError: they cannot fit.
        """
        checked, template = check_messages(messages), ChatTemplate(**options)
        template.check(self.tokenizer)
        parts = {
            "messages": checked,
            "tools": list(template.tools or ()),
            "chat_template_kwargs": dict(template.chat_template_kwargs or {}),
        }
        text = self._render(template, parts)
        self._check(text, any_length=truncate_prompt_tokens is not None)
        marked = None if allow_special_tokens else self._control_tokens.marked(parts)
        if marked is not None:
            text = self._render(template, marked)
        try:
            if marked is not None:
                token_ids = self._control_tokens.encode(text)
            else:
                token_ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:
            raise InvalidRequestError(
                f"the tokenizer refuses the messages: {shown(error)}"
            ) from error
        return self._in_vocabulary(self._end_of(token_ids, truncate_prompt_tokens))

    def encode_bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the token ids of words as they begin a text, and as they follow a space.

        The second form is left out where it has more tokens, or begins with the same one.

        Raises:
            InvalidRequestError: there is no tokenizer, or it has no token for a word.
        """
        found: list[list[int]] = []
        for word in words:
            forms = [self._ids_of(word.lstrip()), self._ids_of(f" {word.lstrip()}")]
            if not forms[0]:
                raise refusal(f"bad_words has {shown(word)}, which has no tokens", "bad_words")
            first, spaced = forms
            found.append(first)
            if spaced and spaced[0] != first[0] and len(spaced) == len(first):
                found.append(spaced)
        return found

    def _ids_of(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise refusal("bad_words need a tokenizer: use logit_bias", "bad_words")
        try:
            token_ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # of any type, and must end no other request
            raise refusal(
                f"the tokenizer refuses bad_words: {shown(error)}", "bad_words"
            ) from error
        return self._in_vocabulary(token_ids)

    def _render(self, template: ChatTemplate, parts: Mapping[str, Any]) -> str:
        try:
            return template.render(self.tokenizer, parts)
        except Exception as error:  # templates raise errors of any type for roles and orders
            raise InvalidRequestError(
                f"the chat template refuses these messages: {cut(str(error))}"
            ) from error

    def _check(self, text: str, *, any_length: bool = False) -> None:
        """Refuse a text that is not valid Unicode, or has too many characters to fit."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the prompt is not valid text: {cut(str(error))}") from None
        if (
            any_length or len(text) <= self._max_model_len or self._bound is None
        ):  # a token has a character
            return
        if self._bound.exceeds(text, self._max_model_len - 1):
            raise prompt_too_long(
                f"{len(text)} characters, of which a token has at most {self._bound.longest}",
                self._max_model_len,
            )

    @cached_property
    def _bound(self) -> TextBound | None:
        return text_bound(self.tokenizer)

    def _in_vocabulary(self, token_ids: list[int]) -> list[int]:
        """Return token ids unchanged; a tokenizer may know more of them than the model."""
        size = self._vocab_size
        if size is not None and max(token_ids, default=0) >= size:
            token = next(token for token in token_ids if token >= size)
            raise InvalidRequestError(
                f"prompt token {shown(token)} is outside the vocabulary of {size}"
            )
        return token_ids
