"""How the command line writes what the package logs: text with `key=value`, or JSON lines.

A record's fields are what its `extra=` gave: `event`, `request_id`, `reason` and counts.
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
    """What `extra=` gave to a record; names with a `_` before are other packages' (Ray marks every
    record of a process that imports it)."""
    found = vars(record).items()
    return {k: v for k, v in found if k not in _STANDARD and not k.startswith("_")}


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message key=value ...`; values that are no single word are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname, f"{record.name}:", record.getMessage()]
        words += [f"{name}={_word(value)}" for name, value in fields(record).items()]
        return " ".join(words) + (f"\n{trace}" if (trace := _trace(self, record)) else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the record's fields."""

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
    """Writes to what `sys.stderr` is at that time: a live view puts its own there."""

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
    """Show the package's own log records inside, and those of the HTTP server that it runs; other
    packages' are left as they are."""
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
