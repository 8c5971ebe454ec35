"""`spectral-paged serve` reads its options, loads the model and runs the server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence

from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.options import LLMOptions, add_options, given_options, lora_modules, port_number
from spectral_paged.server.settings import ServerSettings

API_KEY_VARIABLE = "SPECTRAL_PAGED_API_KEY"
DEV_MODE_VARIABLE = "SPECTRAL_PAGED_SERVER_DEV_MODE"
METRICS_KEY_VARIABLE = "SPECTRAL_PAGED_METRICS_KEY"
UPDATING_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="alias, hub id, folder or .gguf file")
    add_options(parser, LLMOptions)
    parser.add_argument(
        "--warm-up",
        action="store_true",
        help="on CUDA: compile and capture every decode graph before the first request",
    )
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address or name to listen at")
    http.add_argument("--port", type=port_number, default=8000, help="port; 0 takes any free one")
    add_options(http, ServerSettings)


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """Return the settings of a command line and its environment.

    Raises:
        InvalidRequestError: a key is not valid, a time is negative, or limits contradict.
    """
    given = {"model_names": (args.model,)} | given_options(args, ServerSettings)
    if "api_keys" not in given and (key := os.environ.get(API_KEY_VARIABLE)):
        given["api_keys"] = (key,)
    if "metrics_key" not in given and (key := os.environ.get(METRICS_KEY_VARIABLE)):
        given["metrics_key"] = key
    if os.environ.get(UPDATING_VARIABLE, "").strip().lower() in ("1", "true"):
        given = {"allow_runtime_lora_updating": True} | given
    if "dev_mode" not in given and (mode := os.environ.get(DEV_MODE_VARIABLE)):
        if mode not in ("0", "1"):
            raise InvalidRequestError(f"${DEV_MODE_VARIABLE} is {shown(mode)}: write 0 or 1")
        given["dev_mode"] = mode == "1"
    if "allowed_origins" in given:
        given["allowed_origins"] = _origins(given["allowed_origins"])
    lists = ("model_names", "api_keys")
    return ServerSettings(**given | {name: tuple(given[name]) for name in lists if name in given})


def _origins(given: Sequence[str]) -> tuple[str, ...]:
    """Read several origins, or one JSON list of them as vLLM's option takes it."""
    if len(given) != 1 or not given[0].lstrip().startswith("["):
        return tuple(given)
    try:
        listed = json.loads(given[0])
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"--allowed-origins {shown(given[0])} is no JSON list ({error}): write the origins "
            "behind each other instead"
        ) from None
    return tuple(str(origin) for origin in listed)


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return 0, or 1 if the engine's thread died."""
    from spectral_paged.server.app import Service  # first: raises if a package is missing
    from spectral_paged.server.http_server import HttpServer
    from spectral_paged.server.served_names import check_names

    settings, options = settings_of(args), given_options(args, LLMOptions)
    names = [module.lora_name for module in lora_modules(options.get("lora_modules", ()))]
    check_names(settings, names, enable_lora=options.get("enable_lora", False))
    with bound(args.host, args.port) as listener:
        from spectral_paged.llm import LLM

        llm = LLM(args.model, **options)
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
