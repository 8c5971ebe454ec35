"""What a caller says of the chat template beside its messages: names and meaning are vLLM's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from spectral_paged.errors import refusal, shown


class ChatOptions(TypedDict, total=False):
    """The fields of `ChatTemplate` as keywords of a call."""

    tools: Sequence[Mapping[str, Any]] | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool
    continue_final_message: bool


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How messages become a prompt.

    Args:
        tools: functions that the model may call, in OpenAI's form.
        chat_template: instead of the tokenizer's.
        chat_template_kwargs: values that the template reads.
        add_generation_prompt: open the assistant's turn.
        continue_final_message: leave the last message's turn open, for the model to go on with;
            `add_generation_prompt` has to be False then.

    Raises:
        InvalidRequestError: a value is of another type, or two do not go together.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        kwargs = self.chat_template_kwargs
        if not isinstance(self.chat_template, str | None):
            raise _wrong("chat_template", self.chat_template, "a template's text")
        if not isinstance(kwargs, Mapping | None):
            raise _wrong("chat_template_kwargs", kwargs, "an object")
        for name in ("add_generation_prompt", "continue_final_message"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.add_generation_prompt and self.continue_final_message:
            raise refusal(
                "continue_final_message leaves a turn open, and add_generation_prompt opens the "
                "next: make one of them false",
                "continue_final_message",
            )

    def check(self, tokenizer: Any) -> None:
        """Refuse what cannot be rendered with a tokenizer.

        Raises:
            InvalidRequestError: there is no template, it takes no tools, or its values have names
                that are not its own.
        """
        found = self.chat_template or getattr(tokenizer, "chat_template", None)
        if tokenizer is None or not found:
            raise refusal(
                "the model has no chat template: use generate with a prompt, or give its tokenizer "
                "a chat_template",
                "messages",
            )
        if self.tools and "tools" not in str(found):
            raise refusal(
                "the model's chat template takes no tools: leave them out, or serve a model that "
                "was trained to call them",
                "tools",
            )
        if self.chat_template_kwargs:
            # arguments of transformers' method, which decide what it returns
            reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
            taken = sorted(str(name) for name in self.chat_template_kwargs if name in reserved)
            if taken:
                raise refusal(
                    f"chat_template_kwargs has {shown(taken)}, which are no values of a template",
                    "chat_template_kwargs",
                )

    def render(self, tokenizer: Any, parts: Mapping[str, Any]) -> str:
        """Return the text of a conversation.

        Args:
            parts: messages, tools and values, as they are or with marks in their text.
        """
        tools = {"tools": parts["tools"]} if parts["tools"] else {}
        own = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return str(
            tokenizer.apply_chat_template(
                parts["messages"],
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=self.continue_final_message,
                tokenize=False,
                **tools,
                **own,
                **parts["chat_template_kwargs"],
            )
        )


def _wrong(name: str, value: object, text: str) -> Exception:
    return refusal(f"{name} is {shown(value)}; it must be {text}", name)
