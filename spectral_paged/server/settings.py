"""The settings of a server: model names, API keys and limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spectral_paged.errors import InvalidRequestError, shown

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@*,A-Z]+")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Names, keys and limits of a server.

    Args:
        model_names: names of the model in requests; responses use the first.
        api_keys: bearer tokens for `/v1`; none: it is open to all.
        metrics_key: bearer token for `/metrics`; None: it is open to all.
        prefix_cache_per_key: requests share cached prompt tokens with requests of the same API
            key only, so `cached_tokens` and response times tell nothing of other keys' prompts;
            None: where there are several keys.
        allowed_origins: origins of pages whose scripts may read answers (CORS), as browsers send
            them; `*`: all.
        max_num_requests: the most completions (prompts times `n`) that run or wait at once; more
            get a 429.
        max_body_bytes: the most bytes of a body.
        max_total_body_bytes: the most bytes of all bodies that arrive or wait to be parsed; more
            get a 429.
        max_tokens: the most tokens that one completion may ask for; None: as many as fit.
        max_stops: the most stop strings, and stop token ids, of a request, because each is searched
            after every token.
        max_stop_chars: the most characters of a stop string.
        max_salt_chars: the most characters of a cache salt, which every completion stores and
            hashes.
        body_seconds: the time in which a body must arrive.
        send_seconds: the time after which a client that receives nothing of its stream counts as
            disconnected.
        grace_seconds: the time for which requests continue after the signal to stop.
        retry_seconds: the value of `Retry-After` in a 429.

    Raises:
        InvalidRequestError: an origin is none that a browser sends, `prefix_cache_per_key` has no
            keys, or `max_body_bytes` exceeds `max_total_body_bytes`.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    metrics_key: str | None = None
    prefix_cache_per_key: bool | None = None
    allowed_origins: tuple[str, ...] = ()
    max_num_requests: int = 1024
    max_body_bytes: int = 8 << 20
    max_total_body_bytes: int = 256 << 20
    max_tokens: int | None = None
    max_stops: int = 16
    max_stop_chars: int = 256
    max_salt_chars: int = 256
    body_seconds: float = 60.0
    send_seconds: float = 60.0
    grace_seconds: float = 30.0
    retry_seconds: int = 1

    def __post_init__(self) -> None:
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidRequestError(
                    f"allowed origin {shown(origin)} is none that a browser sends: write "
                    "scheme://host or scheme://host:port, in small letters and without a path, "
                    "several behind each other; 'null' for local files, or '*' for all"
                )
        if self.prefix_cache_per_key and not self.api_keys:
            raise InvalidRequestError(
                "--prefix-cache-per-key needs keys to go by: give --api-key, or leave it out"
            )
        if self.max_total_body_bytes < self.max_body_bytes:
            raise InvalidRequestError(
                f"--max-total-body-bytes is {self.max_total_body_bytes}, less than "
                f"--max-body-bytes {self.max_body_bytes}: the longest body would never fit"
            )

    @property
    def salts_by_key(self) -> bool:
        """True if each API key has cached prompt tokens of its own."""
        if self.prefix_cache_per_key is None:
            return len(set(self.api_keys)) > 1
        return self.prefix_cache_per_key
