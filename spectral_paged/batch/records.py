"""The records of a batch: what is written for a line that was served, and for one that was not."""

from __future__ import annotations

import time
from typing import Any

from spectral_paged.batch.file import BatchLine
from spectral_paged.errors import SpectralPagedError
from spectral_paged.openai import (
    CHAT_URL,
    chat_choice,
    prompt_tables,
    text_choice,
    token_counts,
    usage,
)
from spectral_paged.outputs import RequestOutput


def error_record(line: BatchLine, error: SpectralPagedError) -> dict[str, Any]:
    """Return the record of a line that could not be served."""
    detail = {"type": type(error).__name__, "message": str(error), "line": line.number}
    record: dict[str, Any] = {"line": line.number, "line_hash": line.digest}
    if line.custom_id is not None:
        record["custom_id"] = line.custom_id
    if line.url is not None:
        record |= {"id": f"batch_req_{line.number}", "response": None}
        detail["code"] = detail["type"]  # where OpenAI's clients look
    return record | {"error": detail}


def result_record(line: BatchLine, output: RequestOutput, model: str) -> dict[str, Any]:
    """Return the record of a finished line, in OpenAI's format for an OpenAI batch line."""
    record: dict[str, Any] = {"line": line.number, "line_hash": line.digest}
    if line.custom_id is not None:
        record["custom_id"] = line.custom_id
    if line.url is None:
        outputs = [
            {
                "index": c.index,
                "text": c.text,
                "token_ids": c.token_ids,
                "finish_reason": c.finish_reason,
                **({} if c.logprobs is None else {"logprobs": prompt_tables(c.logprobs)}),
            }
            for c in output.outputs
        ]
        metrics = {
            "cached_tokens": output.metrics.num_cached_tokens,
            "host_cached_tokens": output.metrics.num_host_cached_tokens,
            "disk_cached_tokens": output.metrics.num_disk_cached_tokens,
            "pages_sealed": output.metrics.num_pages_sealed,
            "compression_ratio": round(output.metrics.compression_ratio, 4),
            "preemptions": output.metrics.num_preemptions,
            "recomputed_tokens": output.metrics.num_recomputed_tokens,
        }
        counts = token_counts([output])
        record |= {"outputs": outputs, "usage": counts, "metrics": metrics, "error": None}
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = prompt_tables(output.prompt_logprobs)
        return record
    chat = line.url == CHAT_URL
    assert line.params is not None, "a line without an error has them"
    choices = [
        chat_choice(c, line.params, line.tools) if chat else text_choice(c) for c in output.outputs
    ]
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{line.number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage([output]),
    }
    if output.prompt_logprobs is not None:
        found = {"prompt_logprobs": prompt_tables(output.prompt_logprobs)}
        if chat:
            body |= found
        else:
            body["choices"] = [{**choice, **found} for choice in choices]
    response = {"status_code": 200, "request_id": output.request_id, "body": body}
    return record | {"id": f"batch_req_{line.number}", "response": response, "error": None}
