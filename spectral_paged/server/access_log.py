"""Every HTTP request gets an id, is counted and logged, without its content."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware that counts and logs HTTP requests.

    Args:
        registry: gets `http_requests_total` and `http_requests_in_progress`.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._total = Counter(
            "http_requests", "Answers by route and status.", ("route", "status"), registry=registry
        )
        self._in_progress = Gauge(
            "http_requests_in_progress", "Requests being answered.", registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        found: dict[str, Any] = {"status": 500, "ended": False}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                found["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                found["ended"] = True

        begin = time.monotonic()
        with self._in_progress.track_inprogress():
            try:
                await self._app(scope, receive, watched)
            except Exception:  # the caller responds 500
                found["ended"] = True
                raise
            finally:
                status = found["status"] if found["ended"] else 499
                route = getattr(scope.get("route"), "path", "none")
                self._total.labels(route, status).inc()
                seconds = round(time.monotonic() - begin, 3)
                fields = {
                    "event": "http",
                    "request_id": request_id,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": seconds,
                }
                logger.info("answered", extra=fields)
