"""Routes of a caller who may do anything to the server, as vLLM's development mode has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.server.engine_thread import EngineThread


def add_dev_routes(app: FastAPI, engine: EngineThread, dependencies: Sequence[Any]) -> None:
    """Add them; the description does not list them.

    Args:
        dependencies: of each route, such as the check of its key.
    """

    async def sleep(request: Request) -> Response:
        asked = request.query_params
        level = asked.get("level", "1")
        if level not in ("0", "1", "2"):
            raise InvalidRequestError(f"level is {shown(level)}; it must be 0 or 1")
        await engine.sleep(int(level), asked.get("mode", "abort"))
        return Response()

    async def wake_up(request: Request) -> Response:
        await engine.wake_up(request.query_params.getlist("tags") or None)
        return Response()

    async def is_sleeping() -> Response:
        return JSONResponse({"is_sleeping": engine.is_sleeping})

    async def reset_prefix_cache() -> Response:
        await engine.call(engine.llm.cache.reset_prefix_cache)
        return Response()

    hidden: dict[str, Any] = {"dependencies": dependencies, "include_in_schema": False}
    app.add_api_route("/sleep", sleep, methods=["POST"], **hidden)
    app.add_api_route("/wake_up", wake_up, methods=["POST"], **hidden)
    app.add_api_route("/is_sleeping", is_sleeping, methods=["GET"], **hidden)
    app.add_api_route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"], **hidden)
