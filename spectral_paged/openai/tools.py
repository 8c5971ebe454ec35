"""The tools of a chat body: functions that a model may call, and which of them it has to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from spectral_paged.errors import refusal, shown
from spectral_paged.openai.strict import Strict
from spectral_paged.openai.tool_calls import (
    FORMS,
    MARKERS,
    ForcedReader,
    ToolCallReader,
    forced_schema,
    form_of,
)
from spectral_paged.sampling import SamplingParams, StructuredOutputsParams

MAX_TOOLS = 128  # as OpenAI's


class Function(Strict):
    """A function: its name, what it does, and the JSON schema of its arguments."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that a model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    """The choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, in OpenAI's form, and which of them its answer calls.

    choice: `auto`, or `required`: the answer is calls and nothing else.
    name: of the only tool that may be called, which is required then.
    parallel: False: at most one call.
    form: in which the model writes calls of its own accord; None until `bound`.
    """

    tools: list[dict[str, Any]]
    choice: Literal["auto", "required"]
    name: str | None = None
    parallel: bool = True
    form: str | None = None

    @classmethod
    def of(
        cls, tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool | None
    ) -> ToolUse | None:
        """Return the use that a body asks for; None without tools, or if none may be called.

        Raises:
            InvalidRequestError: two tools have one name, or none has the name that is chosen.
        """
        names = [tool.function.name for tool in tools]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise refusal(f"tools has {shown(twice[0])} twice: give each its own name", "tools")
        name = choice.function.name if isinstance(choice, NamedTool) else None
        if name is not None and name not in names:
            raise refusal(
                f"tool_choice names {shown(name)}; tools has {shown(names)}", "tool_choice"
            )
        if choice == "required" and not tools:
            raise refusal("tool_choice is 'required', and there are no tools", "tool_choice")
        if not tools or choice == "none":
            return None
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        kind: Literal["auto", "required"] = "auto" if choice in (None, "auto") else "required"
        return cls(described, kind, name, parallel is not False)

    def bound(self, tokenizer: Any, form: str | None = None) -> ToolUse:
        """Return the use of a model's tools in the form of its calls.

        Args:
            form: of `FORMS`; None: the one that the chat template shows.

        Raises:
            InvalidRequestError: the template shows none of the forms.
        """
        found = form or form_of(getattr(tokenizer, "chat_template", None))
        if found is None and self.choice == "auto":
            raise refusal(
                "tools with tool_choice 'auto' need a known form of calls, and the model's chat "
                f"template shows none of {', '.join(FORMS)}: start the server with "
                "--tool-call-parser, or choose a tool",
                "tool_choice",
            )
        return replace(self, form=found)

    def params(self, params: SamplingParams, tokenizer: Any) -> SamplingParams:
        """Return a request's parameters, by which calls show in the text or are all of it."""
        if self.choice == "required":
            schema = forced_schema(self.tools, self.name)
            return replace(params, structured_outputs=StructuredOutputsParams(json=schema))
        marker = MARKERS.get(self.form or "")
        if marker in _special_tokens(tokenizer):
            return replace(params, skip_special_tokens=False)
        return params

    def finish_reason(self, reason: str | None) -> str | None:
        """Return the finish reason of an answer with calls, as OpenAI's API does."""
        return "tool_calls" if reason == "stop" and self.name is None else reason

    def reader(self) -> ToolCallReader | ForcedReader:
        """Return a reader of one answer."""
        if self.choice == "auto":
            assert self.form is not None, "a use of tools is bound before answers are read"
            return ToolCallReader(self.form, parallel=self.parallel)
        return ForcedReader(self.name, parallel=self.parallel)


def _special_tokens(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content for token in added.values() if token.special}
