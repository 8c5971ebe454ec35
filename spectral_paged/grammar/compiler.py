"""Structured outputs are compiled into grammars, beside the engine and within a time limit."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from spectral_paged.errors import (
    InvalidRequestError,
    SpectralPagedError,
    cut,
    missing_extra,
    refusal,
)
from spectral_paged.grammar.constraint import Grammar
from spectral_paged.grammar.vocabulary import Vocabulary
from spectral_paged.sampling import StructuredOutputsParams

COMPILE_SECONDS = 10.0
MOST_KEPT = 256  # grammars


class GrammarCompiler:
    """Compiles structured outputs for one vocabulary, and keeps the grammars last asked for.

    Threads may call it at once. llguidance bounds its own work and releases Python's lock, so other
    threads go on meanwhile.

    Args:
        vocabulary: returns the tokens there are; None: there is no tokenizer. It is called once,
            with the first grammar.
        end_tokens: ids that end a completion.
        seconds: the longest that a caller waits for a grammar.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary] | None,
        end_tokens: Sequence[int],
        seconds: float = COMPILE_SECONDS,
    ) -> None:
        self._vocabulary = vocabulary
        self._end_tokens = tuple(end_tokens)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._executor: Any = None
        self._num_tokens = 0
        self._known: OrderedDict[str, Grammar] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None

    def compile(self, asked: StructuredOutputsParams) -> Grammar:
        """Return the grammar of what a request asks for.

        Raises:
            InvalidRequestError: it cannot be compiled, or not in time; the message says why.
            MissingPackageError: llguidance is not installed.
        """
        key = asked.text
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
            work = self._threads.submit(self._compile, asked)
        try:
            grammar = work.result(timeout=self._seconds)
        except TimeoutError:
            work.cancel()
            raise _refused(f"it took more than {self._seconds:g} s: make it smaller") from None
        with self._lock:
            self._known[key] = grammar
            while len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
        return grammar

    def prepare(self, several: Iterable[StructuredOutputsParams | None]) -> None:
        """Compile what requests will ask for, before they take their turn with an engine.

        What is refused here is refused again, with its reason, when it is asked for.
        """
        for asked in {id(one): one for one in several if one is not None}.values():
            with suppress(SpectralPagedError):
                self.compile(asked)

    def _make_tokenizer(self) -> Any:
        if self._vocabulary is None:
            raise refusal(
                "structured_outputs need a tokenizer, and this model was given none",
                "structured_outputs",
            )
        try:
            from llguidance import LLExecutor, LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise missing_extra(
                "structured outputs need the package llguidance", "structured"
            ) from error
        words = self._vocabulary()
        self._num_tokens = words.num_tokens
        self._executor = LLExecutor()
        return LLTokenizer(TokenizerWrapper(words), n_vocab=len(words.tokens))

    def _without_beginning(self, matcher: Any) -> str:
        """Return why no token may come first, or nothing if one may."""
        beginning = matcher.deep_copy()
        bits = np.frombuffer(beginning.compute_bitmask(), dtype=np.uint8)
        if beginning.is_error():
            return "the tokenizer has no token that it may begin with"
        allowed = int(np.unpackbits(bits, bitorder="little")[: self._num_tokens].sum())
        return "" if allowed else "it matches no text but the empty one"

    def _compile(self, asked: StructuredOutputsParams) -> Grammar:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokenizer, _source_of(asked), log_level=0)
            error = str(matcher.get_error()) or self._without_beginning(matcher)
        except (ValueError, RecursionError) as cause:  # of the schema's JSON
            error = str(cause)
        if error:
            raise _refused(cut(error.partition("\n<state>")[0]))
        return Grammar(matcher, self._executor, self._num_tokens, self._end_tokens)


def _source_of(asked: StructuredOutputsParams) -> str:
    """Return a grammar as llguidance reads it, of what was asked for when `asked` was made."""
    from llguidance import LLMatcher, grammar_from

    form = json.loads(asked.text)
    if form["regex"] is not None:
        return str(LLMatcher.grammar_from_regex(form["regex"]))
    if form["choice"] is not None:
        choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in form["choice"])
        return str(LLMatcher.grammar_from_lark(f"start: {choices}"))
    if form["grammar"] is not None:
        return str(grammar_from("grammar", form["grammar"]))
    schema: Any = {"type": "object"}
    if form["json"] is not None:
        schema = json.loads(form["json"]) if isinstance(form["json"], str) else form["json"]
        if not isinstance(schema, dict):
            raise ValueError("a JSON schema is an object")
    if asked.disable_additional_properties:
        _close(schema)
    options: Any = {"whitespace_flexible": not asked.disable_any_whitespace}
    if asked.whitespace_pattern is not None:
        options["whitespace_pattern"] = asked.whitespace_pattern
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options))


def _close(schema: Any) -> None:
    """Let objects of a schema have no properties but those that it names."""
    if isinstance(schema, dict):
        for inner in schema.values():
            _close(inner)
        if "properties" in schema or "patternProperties" in schema:
            schema.setdefault("additionalProperties", False)
    elif isinstance(schema, list):
        for inner in schema:
            _close(inner)


def _refused(why: str) -> InvalidRequestError:
    return refusal(f"structured_outputs cannot be compiled: {why}", "structured_outputs")
