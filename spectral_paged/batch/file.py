"""The input and output files of a JSONL batch; finished records survive a kill of the process.

```
in    {"prompt": "..."} | "..." | {"prompt_token_ids": [...]} | {"messages": [...]}
      | an OpenAI batch line (custom_id, url, body)
out   one record a line, as each finishes, with the input's line number and a hash of its bytes
```
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import IO, Any

import filelock

from spectral_paged.batch.source import raw_lines
from spectral_paged.engine import ENCODING_KEYS, ChatOptions, check_messages, check_salt, parts_of
from spectral_paged.errors import (
    CorruptFileError,
    InvalidRequestError,
    RequestFailedError,
    SpectralPagedError,
    shown,
)
from spectral_paged.file_limits import (
    MAX_LINE_BYTES,
    MAX_RECORD_BYTES,
    amount,
    bounded_lines,
    is_cut,
)
from spectral_paged.openai import (
    CHAT_URL,
    COMPLETIONS_URL,
    SAMPLING_FIELDS,
    ToolUse,
    parse_body,
    parse_json,
)
from spectral_paged.sampling import SamplingParams

LINE_FIELDS = (
    "prompt",
    "prompt_token_ids",
    *ENCODING_KEYS,
    "messages",
    "custom_id",
    "id",
    "sampling_params",
    "cache_salt",
    "model",
)
_RECORD_START = b'{"line": '

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of input, with `messages` or `prompt` set, or else `error`.

    digest: 16 hex digits of SHA-256 over the line's bytes.
    template: what the line says of the chat template.
    named: sampling fields that the line or the run names; the model's own defaults are for others.
    model: the LoRA adapter that serves it, or the model itself, by name.
    """

    number: int
    digest: str
    custom_id: str | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: ToolUse | None = None
    template: ChatOptions = field(default_factory=ChatOptions)
    params: SamplingParams | None = None
    url: str | None = None
    cache_salt: str = ""
    error: SpectralPagedError | None = None
    named: frozenset[str] = frozenset(SAMPLING_FIELDS)
    model: str | None = None


def read_lines(path: str | PathLike[str], defaults: Mapping[str, Any]) -> Iterator[BatchLine]:
    """Yield the lines of a JSONL file that are not blank. A bad line has its error as `error`.

    Args:
        defaults: sampling values for fields that a line does not have.
    """
    seen: dict[str, int] = {}
    for number, raw in raw_lines(Path(path)):
        line = _read_line(number, raw, defaults)
        if line.custom_id is not None:
            first = seen.setdefault(line.custom_id, number)
            if first != number and line.error is None:
                error = InvalidRequestError(
                    f"id {shown(line.custom_id)} is taken by line {first}: ids must differ"
                )
                line = replace(line, error=error)
        yield line


def count_lines(path: Path) -> int:
    """Return the number of lines that are not blank."""
    return sum(1 for _ in raw_lines(path))


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _read_line(number: int, raw: bytes, defaults: Mapping[str, Any]) -> BatchLine:
    """Read one line. A bad one keeps its id and url, so that its error record can be assigned."""
    digest, value = _digest(raw), None
    try:
        value = _json_object(raw)
        return _parse(number, digest, value, defaults)
    except Exception as cause:  # of any type, and must end no other line
        error = cause
        if not isinstance(error, SpectralPagedError):
            error = RequestFailedError(f"line {number} cannot be read: {shown(cause)}")
            error.__cause__ = cause
        custom_id = _custom_id(value) if value is not None else None
        url = value.get("url") if value is not None else None
        if url not in (CHAT_URL, COMPLETIONS_URL):  # with a body it is OpenAI's line all the same
            url = COMPLETIONS_URL if value is not None and "body" in value else None
        return BatchLine(number, digest, custom_id=custom_id, url=url, error=error)


def _json_object(raw: bytes) -> dict[str, Any]:
    if is_cut(raw, MAX_LINE_BYTES):
        raise InvalidRequestError(
            f"the line has more than {amount(MAX_LINE_BYTES)}: is the file JSONL, with line ends?"
        )
    value = parse_json(raw)
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"a line is an object or a string, this one is a {type(value).__name__}"
        )
    return value


def _custom_id(value: Mapping[str, Any]) -> str | None:
    custom_id = value.get("custom_id", value.get("id"))
    return None if custom_id is None else str(custom_id)


def _parse(
    number: int, digest: str, value: dict[str, Any], defaults: Mapping[str, Any]
) -> BatchLine:
    if "body" in value:
        return _parse_openai(number, digest, value, defaults)
    given = value.get("sampling_params") or {}
    if not isinstance(given, dict):
        raise InvalidRequestError(f"sampling_params is {shown(given)}; it must be an object")
    given = given | {k: v for k, v in value.items() if k in SAMPLING_FIELDS}
    given = {k: v for k, v in given.items() if v is not None}
    extra = set(value) - set(SAMPLING_FIELDS) - set(LINE_FIELDS)
    if extra:
        raise InvalidRequestError(
            f"unknown fields {shown(sorted(extra))}: a line takes {', '.join(LINE_FIELDS)}, and "
            "sampling fields"
        )
    prompt, messages = _prompt(value), value.get("messages")
    if (messages is None) == (prompt is None):
        raise InvalidRequestError("a line needs either 'prompt' or 'messages'")
    return BatchLine(
        number,
        digest,
        custom_id=_custom_id(value),
        prompt=prompt,
        messages=None if messages is None else check_messages(messages),
        params=_params(dict(defaults) | given),
        cache_salt=_cache_salt(value),
        named=frozenset({*defaults, *given}),
        model=_model(value),
    )


def _parse_openai(
    number: int, digest: str, value: dict[str, Any], defaults: Mapping[str, Any]
) -> BatchLine:
    url = value.get("url")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise InvalidRequestError(f"url is {shown(url)}; use {CHAT_URL!r} or {COMPLETIONS_URL!r}")
    if value.get("method", "POST") != "POST":
        raise InvalidRequestError(f"method is {shown(value['method'])}; use 'POST'")
    extra = sorted(set(value) - {"custom_id", "method", "url", "body"})
    if extra:
        raise InvalidRequestError(f"unknown fields {shown(extra)} beside the body: leave them out")
    if not isinstance(value.get("custom_id"), str):
        raise InvalidRequestError("a batch line needs a custom_id string")
    request = parse_body(value["body"], chat=url == CHAT_URL, defaults=defaults)
    for name in ("stream", "echo"):
        if getattr(request, name):
            raise InvalidRequestError(f"body field {shown(name)} is not supported in a batch line")
    if len(request.prompts) > 1:
        raise InvalidRequestError(
            f"prompt has {len(request.prompts)} prompts; a batch line takes one"
        )
    return BatchLine(
        number,
        digest,
        custom_id=value["custom_id"],
        prompt=request.prompts[0] if request.prompts else None,
        messages=request.messages,
        tools=request.tools,
        template=request.template,
        params=request.params,
        url=url,
        cache_salt=request.cache_salt,
        named=request.named | set(defaults),
        model=request.model,
    )


def _cache_salt(value: Mapping[str, Any]) -> str:
    salt = value.get("cache_salt")
    return "" if salt is None else check_salt(salt)


def _model(value: Mapping[str, Any]) -> str | None:
    model = value.get("model")
    if not isinstance(model, str | None):
        raise InvalidRequestError(f"model is {shown(model)}; it must be a text")
    return model


def _prompt(value: Mapping[str, Any]) -> str | list[int] | None:
    """Return a line's text or token ids, named as in the mappings that `LLM.generate` takes."""
    names = ("prompt", "prompt_token_ids", *ENCODING_KEYS)
    given = {name: value[name] for name in names if value.get(name) is not None}
    if not given:
        return None
    prompt = parts_of(given)[0]
    if not isinstance(prompt, str | list):
        raise InvalidRequestError("prompt must be a string or a list of token ids")
    return prompt


def _params(values: Mapping[str, Any]) -> SamplingParams:
    unknown = set(values) - set(SAMPLING_FIELDS)
    if unknown:
        raise InvalidRequestError(f"unknown sampling fields {shown(sorted(unknown))}")
    return SamplingParams(**values)


class OutputFile:
    """The output file of a batch, with the lines that an earlier run finished.

    Its first record says as `run` what it was made with, and another run is refused.

    Opening drops a torn last line, which a kill during a write leaves. A record whose hash differs
    from the input line's belongs to another input file. With `overwrite` the first record replaces
    the earlier content, so that a run that never starts loses none. The file is locked, because a
    second run would drop a record that is being written as torn, and serve lines twice. The lock
    is a file beside it, `NAME.lock`.

    Args:
        run: plain values that change every answer: model, format, sampling.

    Attributes:
        num_served: records without an error.

    Raises:
        CorruptFileError: a line of the file is not a record of this program.
        InvalidRequestError: another run writes to the file.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        overwrite: bool = False,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.num_served = 0
        self._run = dict(run or {})
        self._earlier_run: dict[str, Any] | None = None
        self._lock_file = filelock.FileLock(f"{path}.lock")
        self.finished: dict[int, str] = {}
        self._stale = overwrite
        self._file: IO[bytes] = self.path.open("ab")
        try:
            self._lock()
            if not overwrite:
                self._recover()
        except BaseException:
            self._file.close()
            self._lock_file.release()
            raise

    def _lock(self) -> None:
        try:
            self._lock_file.acquire(timeout=0)
        except filelock.Timeout:
            raise InvalidRequestError(
                f"another run writes to {self.path}: wait until it ends, or name another --output"
            ) from None
        except (OSError, NotImplementedError) as error:
            logger.warning(
                "%s cannot be locked (%s): let one process alone write to it", self.path, error
            )

    def _recover(self) -> None:
        end = 0
        with self.path.open("rb") as file:
            for number, raw in bounded_lines(file, MAX_RECORD_BYTES):
                if is_cut(raw, MAX_RECORD_BYTES):  # not a torn end: later lines must not be dropped
                    raise CorruptFileError(
                        f"{self.path}, line {number}: more than {amount(MAX_RECORD_BYTES)}, so no "
                        "record of this program; name another --output"
                    )
                is_record = raw.startswith(_RECORD_START) or _RECORD_START.startswith(raw)
                if is_record and not raw.endswith(b"\n"):
                    break
                try:
                    record = json.loads(raw)
                    self.finished[int(record["line"])] = str(record["line_hash"])
                    self.num_served += record.get("error") is None
                    self._earlier_run = self._earlier_run or record.get("run")
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    raise CorruptFileError(
                        f"{self.path}, line {number}: not a record of this program; name another "
                        "--output, or start again with --overwrite"
                    ) from None
                end += len(raw)
        os.truncate(self.path, end)

    def check(self, source: Path) -> None:
        """Refuse an output file that belongs to another input, before anything is served.

        Raises:
            InvalidRequestError: a record's line is not in `source`, or has other content there.
        """
        left = dict(self.finished)
        for number, raw in raw_lines(source) if left else ():
            if left.get(number) == _digest(raw):
                del left[number]
        if left:
            raise self._foreign(min(left))

    def check_run(self) -> None:
        """Refuse to go on with another model, format or sampling than the output has.

        Raises:
            InvalidRequestError: its first record names another value.
        """
        if self._earlier_run is None:
            return
        for name in sorted(self._earlier_run.keys() | self._run.keys()):
            before, now = self._earlier_run.get(name), self._run.get(name)
            if before != now:
                raise InvalidRequestError(
                    f"{self.path} was begun with {name} {shown(before)}, this run has "
                    f"{shown(now)}: give the same, name another --output, start again with "
                    "--overwrite, or go on all the same with --resume-anyway"
                )

    def _foreign(self, number: int) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self.path} holds the answer to another line {number}: it belongs to another "
            "input; name another --output, or start again with --overwrite"
        )

    def has(self, line: BatchLine) -> bool:
        """True if the line has a record.

        Raises:
            InvalidRequestError: the record of that line number is of other content.
        """
        digest = self.finished.get(line.number)
        if digest is not None and digest != line.digest:
            raise self._foreign(line.number)
        return digest is not None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. A kill of the process after this returns does not lose it."""
        if self._stale:
            self._file.truncate(0)
            self._stale = False
        if self._run and not self.finished:
            record = {**record, "run": self._run}
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.finished[int(record["line"])] = str(record["line_hash"])
        self.num_served += record.get("error") is None

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._lock_file.release()
