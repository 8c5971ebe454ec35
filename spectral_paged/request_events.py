"""What a log says of single requests; the figures are fields of the record, by `extra`."""

from __future__ import annotations

import logging

from spectral_paged.errors import SpectralPagedError
from spectral_paged.request_group import RequestGroup

logger = logging.getLogger(__name__)


def log_refusal(request_id: str, error: SpectralPagedError) -> None:
    """A request that was never queued; its caller has the error too."""
    fields = {"event": "refusal", "request_id": request_id, "reason": type(error).__name__}
    logger.info("refused request %s: %s", request_id, error, extra=fields)


def log_failure(group: RequestGroup, error: SpectralPagedError) -> None:
    """A request that failed while it ran."""
    fields = {
        "event": "failure",
        "request_id": group.request_id,
        "reason": type(error).__name__,
        "num_prompt_tokens": len(group.prompt_token_ids),
        "num_generated_tokens": sum(len(c.generated) for c in group.completions),
    }
    logger.warning("request %s failed: %s", group.request_id, error, extra=fields)
