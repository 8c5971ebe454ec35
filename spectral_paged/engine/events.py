"""Log records of single requests, whose figures are fields of the record (`extra`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from spectral_paged.engine.counters import EngineCounters
from spectral_paged.engine.requests import RequestGroup
from spectral_paged.errors import RequestFailedError, SpectralPagedError, shown

logger = logging.getLogger(__name__)


@contextmanager
def counted_refusal(counters: EngineCounters, request_id: str) -> Iterator[None]:
    """Count and log an error raised inside as the request's refusal, and raise it again.

    Do not nest this context: a refusal would count twice.

    Raises:
        RequestFailedError: an error without a type of this package, which is its cause; a caller
            takes it as one request's own.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except SpectralPagedError as error:
        _count(counters, request_id, error)
        raise
    except BaseException as cause:  # what a tokenizer written in Rust raises is no Exception
        failure = RequestFailedError(
            f"request {shown(request_id)} cannot be prepared: {shown(cause)}"
        )
        _count(counters, request_id, failure)
        raise failure from cause


def _count(counters: EngineCounters, request_id: str, error: SpectralPagedError) -> None:
    counters.count_refusal(error)
    fields = {"event": "refusal", "request_id": request_id, "reason": type(error).__name__}
    logger.info("refused request %s: %s", request_id, error, extra=fields)


def log_failure(group: RequestGroup, error: SpectralPagedError) -> None:
    """Log a request that failed while it ran."""
    fields = {
        "event": "failure",
        "request_id": group.request_id,
        "reason": type(error).__name__,
        "num_prompt_tokens": len(group.prompt_token_ids),
        "num_generated_tokens": sum(len(c.generated) for c in group.completions),
    }
    logger.warning("request %s failed: %s", group.request_id, error, extra=fields)
