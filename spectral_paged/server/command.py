"""`spectral-paged serve` reads its options, loads the model and runs the server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import sys
from collections.abc import Iterator, Sequence

from spectral_paged.arguments import (
    add_engine_options,
    engine_options,
    parse_bytes,
    port_number,
    positive,
)
from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.server.settings import ServerSettings

API_KEY_VARIABLE = "SPECTRAL_PAGED_API_KEY"
METRICS_KEY_VARIABLE = "SPECTRAL_PAGED_METRICS_KEY"


def add_serve(parser: argparse.ArgumentParser) -> None:
    standard = ServerSettings(())
    parser.add_argument("model", help="alias, hub id, folder or .gguf file")
    add_engine_options(parser)
    parser.add_argument(
        "--warm-up",
        action="store_true",
        help="on CUDA: compile and capture every decode graph before the first request",
    )
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1")
    http.add_argument("--port", type=port_number, default=8000, help="0: any; default 8000")
    http.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"asked for by /v1; may be given several times; or set {API_KEY_VARIABLE}",
    )
    http.add_argument(
        "--prefix-cache-per-key",
        action=argparse.BooleanOptionalAction,
        help="requests share cached prompt tokens with those of the same API key only; default: "
        "where there are several keys",
    )
    http.add_argument(
        "--metrics-key",
        metavar="KEY",
        help=f"asked for by /metrics; or set {METRICS_KEY_VARIABLE}; default: it is open",
    )
    http.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what requests call the model; answers use the first; default the model argument",
    )
    http.add_argument(
        "--allowed-origins",
        nargs="+",
        metavar="ORIGIN",
        help="pages of these origins may call the server from a browser (CORS): such as "
        "https://chat.example, '*' for all, or a JSON list; default none",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-num-requests",
        type=positive,
        default=standard.max_num_requests,
        help="completions that run or wait at once; more are answered 429; default "
        f"{standard.max_num_requests}",
    )
    limits.add_argument(
        "--max-body-bytes", type=parse_bytes, default=standard.max_body_bytes, help="default 8MiB"
    )
    limits.add_argument(
        "--max-total-body-bytes",
        type=parse_bytes,
        default=standard.max_total_body_bytes,
        help="of all bodies that arrive or wait to be parsed; more are answered 429; default "
        "256MiB",
    )
    limits.add_argument(
        "--max-tokens-limit", type=positive, help="most tokens that a completion may ask for"
    )
    limits.add_argument(
        "--grace-seconds",
        type=float,
        default=standard.grace_seconds,
        help=f"how long requests go on after SIGTERM; default {standard.grace_seconds:g}",
    )


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """Return the settings of a command line and its environment.

    Raises:
        InvalidRequestError: a key is not valid, a time is negative, or limits contradict.
    """
    keys = tuple(args.api_key or ())
    if not keys and os.environ.get(API_KEY_VARIABLE):
        keys = (os.environ[API_KEY_VARIABLE],)
    metrics_key = args.metrics_key
    if metrics_key is None:
        metrics_key = os.environ.get(METRICS_KEY_VARIABLE) or None
    for name, given in (("an API", keys), ("the metrics", (metrics_key,))):
        if not all(k is None or (k.strip() == k != "" and k.isascii()) for k in given):
            raise InvalidRequestError(
                f"{name} key is empty, begins or ends with a space, or is not ASCII: give another"
            )
    if not (args.grace_seconds >= 0 and math.isfinite(args.grace_seconds)):
        raise InvalidRequestError(
            f"--grace-seconds is {args.grace_seconds}; it must be >= 0 and finite"
        )
    return ServerSettings(
        model_names=tuple(args.served_model_name or (args.model,)),
        api_keys=keys,
        metrics_key=metrics_key,
        prefix_cache_per_key=args.prefix_cache_per_key,
        allowed_origins=_origins(args.allowed_origins or ()),
        max_num_requests=args.max_num_requests,
        max_body_bytes=args.max_body_bytes,
        max_total_body_bytes=args.max_total_body_bytes,
        max_tokens=args.max_tokens_limit,
        grace_seconds=args.grace_seconds,
    )


def _origins(given: Sequence[str]) -> tuple[str, ...]:
    """Read several origins, or one JSON list of them as vLLM's option takes it."""
    if len(given) != 1 or not given[0].lstrip().startswith("["):
        return tuple(given)
    try:
        listed = json.loads(given[0])
    except ValueError as error:
        raise InvalidRequestError(
            f"--allowed-origins {shown(given[0])} is no JSON list ({error}): write the origins "
            "behind each other instead"
        ) from None
    return tuple(str(origin) for origin in listed)


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return 0, or 1 if the engine's thread died."""
    from spectral_paged.server.app import Service  # first: raises if a package is missing
    from spectral_paged.server.http_server import HttpServer

    settings = settings_of(args)
    with bound(args.host, args.port) as listener:
        from spectral_paged.llm import LLM

        llm = LLM(args.model, **engine_options(args))
        if args.warm_up:
            llm.warm_up()
        service = Service(llm, settings)
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        ready = f"serving {settings.model_names[0]} at http://{host}:{port}/v1"
        server = HttpServer(service, lambda: print(ready, file=sys.stderr, flush=True))
        asyncio.run(server.serve([listener]))
    return 1 if service.engine.died else 0


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a socket that listens later, so that a taken port fails before the model is loaded."""
    with contextlib.ExitStack() as stack:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            # asyncio sets TCP_NODELAY where the protocol is TCP by its number; without it the
            # second packet of an answer waits 40 ms for the client's delayed ACK
            listener = stack.enter_context(
                socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            )
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise OSError(
                f"nothing can be served at {host}:{port} ({error}): name another --port or --host"
            ) from error
        yield listener
