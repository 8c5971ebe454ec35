"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

from spectral_paged.errors import (
    CapacityError,
    EmptyPromptError,
    InvalidRequestError,
    NonFiniteError,
    PromptTooLongError,
    RequestFailedError,
    SpectralPagedError,
)
from spectral_paged.openai import ErrorResponse

logger = logging.getLogger(__name__)

INVALID, SERVER = "invalid_request_error", "server_error"
_CODES: dict[type[SpectralPagedError], tuple[str, str | None]] = {
    PromptTooLongError: ("context_length_exceeded", "prompt"),
    CapacityError: ("context_length_exceeded", "prompt"),
    EmptyPromptError: ("empty_prompt", "prompt"),
}


class ApiError(Exception):
    """A response that is an error.

    Args:
        status: the HTTP status; 4xx is the client's fault, 5xx is not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type, self.param, self.code = type, param, code
        self.headers = dict(headers or {})

    @property
    def content(self) -> ErrorResponse:
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def refused(error: SpectralPagedError) -> ApiError:
    """Return the error of a request that can never be served (400).

    An error that is no fault of the request becomes a 500.
    """
    if isinstance(error, RequestFailedError):
        return failed(error)
    code, param = _CODES.get(type(error), ("invalid_value", None))
    return ApiError(400, str(error), param=error.param or param, code=code)


def failed(error: BaseException) -> ApiError:
    """Return the error of an accepted request that failed: 500, or 400 by its own fault.

    An error whose text may have parts of an internal exception goes to the log.
    """
    if isinstance(error, InvalidRequestError):
        return refused(error)
    if isinstance(error, NonFiniteError):
        return ApiError(500, str(error), type=SERVER, code="generation_failed")
    return internal(log_fault("a request failed", error))


def log_fault(what: str, error: BaseException) -> str:
    """Log an internal exception, and return the reference that clients get instead of its text."""
    reference = uuid.uuid4().hex[:16]
    fields = {"event": "fault", "reference": reference}
    logger.error("%s: %r", what, error, exc_info=error, extra=fields)
    return reference


def internal(reference: str, *, code: str = "generation_failed") -> ApiError:
    """Return the error of a request that failed for a reason which only the log shows (500)."""
    return ApiError(
        500,
        f"the server failed on this request: try again, or ask its operator for reference "
        f"{reference} in the log",
        type=SERVER,
        code=code,
    )


def no_room(message: str, *, code: str, retry_seconds: int, **headers: str) -> ApiError:
    """Return the error of a request for which there is no room now (429)."""
    headers = {"Retry-After": str(retry_seconds)} | headers
    return ApiError(429, message, type="rate_limit_error", code=code, headers=headers)


def asleep() -> ApiError:
    """Return the error of a request that is aborted because the engine falls asleep."""
    return ApiError(
        503,
        "the server falls asleep: send the request again when it is awake",
        type=SERVER,
        code="server_asleep",
    )


def stopping() -> ApiError:
    """Return the error of requests that arrive or run while the server stops (503)."""
    return ApiError(
        503,
        "the server is shutting down: send the request to another, or again later",
        type=SERVER,
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def disconnected() -> ApiError:
    """Return the error of a client that has disconnected (499), which only the log shows."""
    return ApiError(499, "the client has gone", code="client_disconnected")
