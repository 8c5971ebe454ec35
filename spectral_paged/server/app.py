"""The service: HTTP routes over an LLM, and the responses to its errors."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, TypeVar

from spectral_paged.errors import SpectralPagedError, cut, missing_extra
from spectral_paged.llm import LLM
from spectral_paged.openai import (
    CHAT_URL,
    COMPLETIONS_URL,
    DETOKENIZE_URL,
    LOAD_ADAPTER_URL,
    RESPONSES_URL,
    TOKENIZE_URL,
    UNLOAD_ADAPTER_URL,
    ModelCard,
    OpenAIRequest,
)
from spectral_paged.outputs import RequestOutput
from spectral_paged.sampling import StructuredOutputsParams

try:
    from fastapi import Depends, FastAPI, Request, Security
    from fastapi.responses import (
        JSONResponse,
        PlainTextResponse,
        Response,
        StreamingResponse,
    )
    from fastapi.security import HTTPBearer
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    from spectral_paged.metrics import MetricsCollector
    from spectral_paged.server import description
    from spectral_paged.server.access_log import AccessLog
    from spectral_paged.server.description import DescribedApp
    from spectral_paged.server.dev_routes import add_dev_routes
    from spectral_paged.server.event_stream import EventStream
except ImportError as error:
    raise missing_extra(
        "the server needs the packages fastapi and prometheus-client", "server"
    ) from error

from spectral_paged.server.adapter_routes import read_load, read_unload
from spectral_paged.server.api_error import ApiError, internal, log_fault, refused, stopping
from spectral_paged.server.api_keys import check_key, salt_of
from spectral_paged.server.concurrency import ConcurrencyLimit, Lease
from spectral_paged.server.engine_thread import EngineThread
from spectral_paged.server.parsing import (
    ParsedRequest,
    entries_of_token,
    parse_request,
)
from spectral_paged.server.pending import Generation
from spectral_paged.server.request_body import Body, BodyRoom, read_body, while_connected
from spectral_paged.server.response import OpenAIResponse
from spectral_paged.server.responses import ResponsesResponse, parse_response, renamed
from spectral_paged.server.served_names import check_names, lora_of, served_names
from spectral_paged.server.settings import ServerSettings
from spectral_paged.server.tokenization import detokenize, tokenize

Parsed = TypeVar("Parsed")
Work = Coroutine[Any, Any, Response]
FEW_ENTRIES = 4096  # tokens and log-probabilities that the event loop makes JSON of itself
LONG_BODY_BYTES = 64 << 10


class Service:
    """Serves an LLM over HTTP; `app` is the ASGI application.

    No other code may use the LLM while the application runs.
    """

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm, self.settings = llm, settings
        names = [request.lora_name for request in llm.list_loras()]
        check_names(settings, names, enable_lora=llm.adapters is not None)
        llm.model_name = settings.model_names[0]  # for metrics and errors: no path of this machine
        self.engine = EngineThread(llm)
        self.concurrency = ConcurrencyLimit(settings.max_num_requests, settings.retry_seconds)
        self.bodies = BodyRoom(
            settings.max_body_bytes, settings.max_total_body_bytes, settings.retry_seconds
        )
        self.stopping = self._ended = False
        self._created = int(time.time())
        if llm.get_tokenizer() is not None:  # the first call sets it up, which is not thread-safe
            llm.get_tokenizer()("a")
        # a thread of its own, so that parsing delays neither the event loop nor the engine's steps
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="parser")
        # long bodies have another, so that short ones do not wait for seconds of tokenization
        self._long_parser = ThreadPoolExecutor(1, thread_name_prefix="long-parser")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._compiler = ThreadPoolExecutor(4, thread_name_prefix="compiler")
        registry = CollectorRegistry()
        MetricsCollector(llm, registry=registry)
        self._metrics: Callable[[], bytes] = lambda: generate_latest(registry)
        self.app = self._build(registry)

    def _build(self, registry: CollectorRegistry) -> FastAPI:
        app = DescribedApp(
            title="spectral-paged",
            version=version("spectral-paged"),
            openapi_url="/openapi.json",
            # with keys, the names are told by /v1/models alone; adapters come and go
            model_names=() if self._names_change else served_names(self.llm, self.settings),
            docs_url="/docs",
            redoc_url=None,
            lifespan=self._lifespan,
            exception_handlers={
                ApiError: _error,
                SpectralPagedError: _refusal,
                HTTPException: _http_error,
                Exception: _fault,
            },
        )
        if self.settings.allowed_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=self.settings.allowed_origins,
                allow_methods=("*",),
                allow_headers=("*",),
                expose_headers=("Retry-After", "X-Request-Id"),
            )
        app.add_middleware(AccessLog, registry=registry)  # around it: preflights are logged too
        keyed = [Depends(self._check_key)]
        if self.settings.api_keys:
            keyed.append(Security(HTTPBearer(auto_error=False)))  # for the description
        get: dict[str, Any] = {"methods": ["GET"], "dependencies": keyed}
        post: dict[str, Any] = {"methods": ["POST"], "dependencies": keyed}
        app.add_api_route("/health", self._health, **description.HEALTH)
        app.add_api_route("/health", self._health, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/metrics", self._scrape, **description.METRICS)
        app.add_api_route("/version", self._version, **description.VERSION)
        app.add_api_route("/v1/models", self._models, **get, **description.MODELS)
        app.add_api_route("/v1/models/{name:path}", self._model, **get, **description.MODEL)
        app.add_api_route(CHAT_URL, self._chat, **post, **description.CHAT)
        app.add_api_route(COMPLETIONS_URL, self._complete, **post, **description.COMPLETIONS)
        app.add_api_route(RESPONSES_URL, self._create_response, **post, **description.RESPONSES)
        app.add_api_route(TOKENIZE_URL, self._tokenize, **post, **description.TOKENIZE)
        app.add_api_route(DETOKENIZE_URL, self._detokenize, **post, **description.DETOKENIZE)
        if self.settings.allow_runtime_lora_updating:
            load, unload = description.LOAD_ADAPTER, description.UNLOAD_ADAPTER
            app.add_api_route(LOAD_ADAPTER_URL, self._load_adapter, **post, **load)
            app.add_api_route(UNLOAD_ADAPTER_URL, self._unload_adapter, **post, **unload)
        if self.settings.dev_mode:
            add_dev_routes(app, self.engine, keyed)
        return app

    @property
    def _names_change(self) -> bool:
        return bool(self.settings.api_keys) or self.settings.allow_runtime_lora_updating

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        # what libraries and the model have made stays: looking through it for garbage would stop
        # every thread for a quarter of a second each time that a large answer is built
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()
            await self.engine.stop()
            for executor in (self._parser, self._long_parser, self._writer, self._compiler):
                executor.shutdown(cancel_futures=True)

    def begin_to_stop(self) -> None:
        """Accept no more requests; running ones continue."""
        self.stopping = True

    def end_all(self) -> None:
        """Abort running requests, whose clients get a 503."""
        self._ended = True
        self.engine.end_all(stopping)

    # ---- routes --------------------------------------------------------------------------

    async def _check_key(self, request: Request) -> None:
        if self.settings.api_keys:
            request.state.api_key = check_key(request.headers, self.settings.api_keys, "API")

    async def _health(self) -> Response:
        problem = "the server is shutting down" if self.stopping else self.engine.problem
        if problem is not None:
            return JSONResponse({"status": "unhealthy", "problem": problem}, 503)
        return JSONResponse({"status": "ok"})

    async def _version(self) -> Response:
        return JSONResponse({"version": version("spectral-paged")})

    async def _scrape(self, request: Request) -> Response:
        if self.settings.metrics_key is not None:
            check_key(request.headers, (self.settings.metrics_key,), "metrics")
        text = await asyncio.to_thread(self._metrics)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    async def _models(self) -> Response:
        names = served_names(self.llm, self.settings)
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        lora_of(self.llm, self.settings, name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> ModelCard:
        card: ModelCard = {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "spectral-paged",
            "max_model_len": self.llm.cache.max_model_len,
        }
        if name not in self.settings.model_names:
            card["parent"] = self.settings.model_names[0]
        return card

    async def _chat(self, request: Request) -> Response:
        return await self._respond(request, partial(self._begin, request, chat=True))

    async def _complete(self, request: Request) -> Response:
        return await self._respond(request, partial(self._begin, request, chat=False))

    async def _create_response(self, request: Request) -> Response:
        return await self._respond(request, partial(self._begin_response, request))

    async def _tokenize(self, request: Request) -> Response:
        return await self._respond(request, partial(self._call, tokenize))

    async def _detokenize(self, request: Request) -> Response:
        return await self._respond(request, partial(self._call, detokenize))

    async def _load_adapter(self, request: Request) -> Response:
        return await self._respond(request, partial(self._change, read_load))

    async def _unload_adapter(self, request: Request) -> Response:
        return await self._respond(request, partial(self._change, read_unload))

    # ---- one request ---------------------------------------------------------------------

    async def _respond(
        self, request: Request, begin: Callable[[Body, Lease, ExitStack], Work]
    ) -> Response:
        """Read the body of a request, and do what `begin` gives while its client is connected."""
        if self.stopping:
            raise stopping()
        with ExitStack() as stack:
            lease = stack.enter_context(self.concurrency.lease())
            body = Body(self.bodies)
            stack.callback(body.drop)
            seconds = self.settings.body_seconds
            await read_body(request.receive, request.headers, body, seconds=seconds)
            return await while_connected(request.receive, begin(body, lease, stack))

    async def _call(
        self,
        function: Callable[[LLM, ServerSettings, bytes], Any],
        body: Body,
        lease: Lease,
        stack: ExitStack,
    ) -> Response:
        """Respond with what a function that runs no step makes of a body."""
        return JSONResponse(await self._parse(body, function))

    async def _change(
        self,
        function: Callable[[LLM, ServerSettings, bytes], Callable[[], str]],
        body: Body,
        lease: Lease,
        stack: ExitStack,
    ) -> Response:
        """Do between two steps what a function makes of a body, and respond with what it says."""
        return PlainTextResponse(await self.engine.call(await self._parse(body, function)))

    async def _begin(
        self, request: Request, body: Body, lease: Lease, stack: ExitStack, *, chat: bool
    ) -> Response:
        """Queue the request and return its response; a stream takes over the exits of `stack`."""
        try:
            parsed = await self._parse(body, partial(parse_request, chat=chat))
            generation = await self._generate(request, parsed, lease, stack)
        except ApiError as error:
            if chat and error.param == "prompt":  # the prompt was made from the messages
                error.param = "messages"
            raise
        asked = parsed.body
        response = OpenAIResponse(
            request.state.request_id,
            asked.model or self.settings.model_names[0],
            chat=chat,
            params=parsed.params,
            num_prompt_tokens=[len(prompt) for prompt in parsed.prompts],
            echoes=parsed.echoes,
            returns_prompt_logprobs=asked.returns_prompt_logprobs,
            tools=asked.tools,
        )
        if not asked.stream:
            return await self._whole(response, await generation.outputs(), parsed)
        chunks = response.chunks(
            generation,
            include_usage=asked.include_usage,
            continuous_usage=asked.continuous_usage,
        )
        seconds = self.settings.send_seconds
        return EventStream(chunks, stack.pop_all().close, seconds=seconds)

    async def _begin_response(
        self, request: Request, body: Body, lease: Lease, stack: ExitStack
    ) -> Response:
        """Queue a request of `/v1/responses` and return its response."""
        try:
            asked, parsed = await self._parse(body, parse_response)
            generation = await self._generate(request, parsed, lease, stack)
        except ApiError as error:
            raise renamed(error) from error
        name = asked.model or self.settings.model_names[0]
        response = ResponsesResponse(request.state.request_id, name, asked, parsed.body.tools)
        if not asked.stream:
            return await self._whole(response, await generation.outputs(), parsed)
        end, seconds = stack.pop_all().close, self.settings.send_seconds
        return EventStream(response.chunks(generation), end, seconds=seconds, named=True)

    async def _generate(
        self, request: Request, parsed: ParsedRequest, lease: Lease, stack: ExitStack
    ) -> Generation:
        """Queue a parsed request, whose completions end with `stack`."""
        form = parsed.params.structured_outputs
        if form is not None:
            await self._compile(parsed.body, form)
        if self._ended:
            raise stopping()
        lease.grow(parsed.num_completions)
        generation = await self.engine.submit(
            request.state.engine_id,
            parsed.prompts,
            parsed.params,
            cache_salt=self._salt(request, parsed.body.cache_salt),
            streams=parsed.body.stream,
            lora_request=parsed.lora,
        )
        stack.callback(generation.close)
        return generation

    async def _whole(
        self,
        response: OpenAIResponse | ResponsesResponse,
        outputs: Sequence[RequestOutput],
        parsed: ParsedRequest,
    ) -> Response:
        """Build the response that is no stream; a large one in a thread, beside the event loop."""
        build = partial(list[bytes], response.pieces(outputs))
        num_tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
        per_token = entries_of_token(self.llm, parsed.params.wanted)
        if num_tokens * per_token + parsed.num_prompt_entries <= FEW_ENTRIES:
            return Response(b"".join(build()), media_type="application/json")
        parts = await asyncio.get_running_loop().run_in_executor(self._writer, build)
        length = {"Content-Length": str(sum(map(len, parts)))}
        return StreamingResponse(_each(parts), headers=length, media_type="application/json")

    def _salt(self, request: Request, cache_salt: str) -> str:
        if not self.settings.salts_by_key:
            return cache_salt
        return salt_of(request.state.api_key, cache_salt)

    async def _compile(self, body: OpenAIRequest, asked: StructuredOutputsParams) -> None:
        """Compile a request's grammar, beside the event loop, parsing and the engine's steps."""
        compile_now = partial(self.llm.engine.grammars.compile, asked)
        try:
            await asyncio.get_running_loop().run_in_executor(self._compiler, compile_now)
        except SpectralPagedError as error:
            self.engine.count_refusal(error)
            if body.by_response_format:
                error.param = "response_format"
            elif body.tools is not None:
                error.param = "tools"
            raise refused(error) from error

    async def _parse(
        self, body: Body, function: Callable[[LLM, ServerSettings, bytes], Parsed]
    ) -> Parsed:
        """Parse the body and drop it, because the request continues with its tokens only."""
        loop = asyncio.get_running_loop()

        def parse() -> Parsed:
            # the bytes are read here, so that a queued call does not keep those of a client that
            # has disconnected
            return function(self.llm, self.settings, bytes(body.data))

        try:
            is_long = len(body.data) > LONG_BODY_BYTES
            return await loop.run_in_executor(self._long_parser if is_long else self._parser, parse)
        except SpectralPagedError as error:
            self.engine.count_refusal(error)
            raise refused(error) from error
        finally:
            body.drop()


async def _each(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


# ---- errors ------------------------------------------------------------------------------


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.content, error.status, headers=error.headers)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, SpectralPagedError)
    return await _error(request, refused(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """Respond to an unknown route or method."""
    assert isinstance(error, HTTPException)
    message = f"{cut(request.method)} {cut(request.url.path)}: {error.detail}"
    code = HTTPStatus(error.status_code).name.lower()
    return await _error(
        request, ApiError(error.status_code, message, code=code, headers=error.headers)
    )


async def _fault(request: Request, error: Exception) -> Response:
    """Respond to an unexpected error, which only the log shows."""
    what = f"request {request.state.request_id} failed"
    return await _error(request, internal(log_fault(what, error), code="internal"))
