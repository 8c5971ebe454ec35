"""Every HTTP request gets an id, is counted, timed and logged, without its content."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)  # of a client's, others are not taken
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
FEW_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
MANY_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5),
    *(5.0, 7.5, 10.0, 30.0, 60.0, 120.0, 300.0),
)


class AccessLog:
    """ASGI middleware that counts, times and logs HTTP requests.

    A request has the id that its client gives as `X-Request-Id`, or one of its own. In the engine
    it has its own, because several requests may come under one name.

    Args:
        registry: gets `http_requests_total`, `http_requests_in_progress` and the histograms of
            seconds, under the names and labels of prometheus-fastapi-instrumentator, which vLLM
            has too.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._total = Counter(
            "http_requests",
            "Answers by route and status.",
            ("handler", "method", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds from a request to the end of its answer, by route.",
            ("handler", "method"),
            buckets=FEW_SECONDS,
            registry=registry,
        )
        self._all_seconds = Histogram(
            "http_request_duration_highr_seconds",
            "Seconds from a request to the end of its answer, all routes together.",
            buckets=MANY_SECONDS,
            registry=registry,
        )
        self._in_progress = Gauge(
            "http_requests_in_progress", "Requests being answered.", registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own_id = uuid.uuid4().hex
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else own_id
        scope.setdefault("state", {}).update(request_id=request_id, engine_id=own_id)
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
                method = scope["method"] if scope["method"] in METHODS else "other"
                seconds = time.monotonic() - begin
                self._total.labels(route, method, status).inc()
                self._seconds.labels(route, method).observe(seconds)
                self._all_seconds.observe(seconds)
                fields = {
                    "event": "http",
                    "request_id": request_id,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(seconds, 3),
                    "engine_id": own_id,
                }
                logger.info("answered", extra=fields)
