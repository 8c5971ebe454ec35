"""The command line writes the package's log records as text with `key=value`, or as JSON lines.

A record's fields come from its `extra=`: `event`, `request_id`, `reason` and counts.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that `extra=` gave to a record.

    Names that begin with `_` are left out: Ray marks every record of a process that imports it.
    """
    found = vars(record).items()
    return {k: v for k, v in found if k not in _STANDARD and not k.startswith("_")}


class TextFormatter(logging.Formatter):
    """Formats `time LEVEL logger: message key=value ...`; values of several words are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname, f"{record.name}:", record.getMessage()]
        words += [f"{name}={_word(value)}" for name, value in fields(record).items()]
        return " ".join(words) + (f"\n{trace}" if (trace := _trace(self, record)) else "")


class JsonFormatter(logging.Formatter):
    """Formats one JSON object a line: time, level, logger, message, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace := _trace(self, record):
            found["exception"] = trace
        return json.dumps(fields(record) | found, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def _word(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and text and not set(text) & set(' "=')
    return text if plain else json.dumps(text)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, because a live view replaces it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        raise AttributeError("this handler always writes to sys.stderr")


@contextmanager
def logging_to_stderr(format: str, level: str) -> Iterator[None]:
    """Write the log records of the package and of its HTTP server to stderr inside.

    Logging of other packages does not change.
    """
    loggers = [logging.getLogger(name) for name in ("spectral_paged", "uvicorn.error")]
    handler, before = _StderrHandler(), [logger.level for logger in loggers]
    handler.setFormatter({"text": TextFormatter, "json": JsonFormatter}[format]())
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level.upper())
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old)
