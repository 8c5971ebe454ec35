"""The settings of a server: model names, API keys and limits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.options import option, parse_bytes, positive

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@*,A-Z]+")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Names, keys and limits of a server.

    Args:
        model_names: names of the model in requests; answers and metrics use the first; default: the
            model argument.
        api_keys: bearer tokens that `/v1` asks for; default: that of $SPECTRAL_PAGED_API_KEY, else
            none, and `/v1` is open to all.
        metrics_key: bearer token that `/metrics` asks for; default: that of
            $SPECTRAL_PAGED_METRICS_KEY, else none, and `/metrics` is open to all.
        tool_call_parser: form in which the model calls tools (`hermes`, `llama3_json`, `mistral`);
            default: the one that its chat template shows.
        prefix_cache_per_key: requests share cached prompt tokens with requests of the same API
            key only, so `cached_tokens` and response times tell nothing of other keys' prompts;
            default: where there are several keys.
        allowed_origins: origins of pages whose scripts may read answers (CORS), as browsers send
            them: such as https://chat.example, `*` for all, or a JSON list; default: none.
        allow_runtime_lora_updating: serve routes that load and unload LoRA adapters. Whoever may
            send requests may then name folders of this machine, so give it with `--api-key`;
            default: on where $VLLM_ALLOW_RUNTIME_LORA_UPDATING is `1` or `true`, as in vLLM.
        dev_mode: serve what a caller may do to the whole server too, with an API key if there are
            any: `/sleep`, `/wake_up`, `/is_sleeping`, `/reset_prefix_cache`; default: on where
            $SPECTRAL_PAGED_SERVER_DEV_MODE is 1.
        max_num_requests: most completions (prompts times `n`) that run or wait at once; more get a
            429.
        max_body_bytes: most bytes of a body.
        max_total_body_bytes: most bytes of all bodies that arrive or wait to be parsed; more get a
            429.
        max_tokens: most tokens that one completion may ask for; default: as many as fit.
        max_response_entries: most entries of one response: prompts times `n` times `max_tokens`,
            each with its log-probabilities, whose entries take about 200 bytes while it runs.
        max_stops: most stop strings, and stop token ids, of a request, because each is searched
            after every token.
        max_stop_chars: most characters of a stop string.
        max_token_rules: most entries of `logit_bias`, and of `allowed_token_ids`, times prompts,
            because the engine reads each of them for every prompt, between two steps.
        max_salt_chars: most characters of a cache salt, which every completion stores and hashes.
        body_seconds: the time in which a body must arrive.
        send_seconds: the time after which a client that receives nothing of its stream counts as
            disconnected.
        grace_seconds: seconds for which requests continue after the signal to stop.
        retry_seconds: the value of `Retry-After` in a 429.

    Raises:
        InvalidRequestError: an origin is none that a browser sends, a key is not valid,
            `prefix_cache_per_key` has no keys, the grace time is negative or endless, or
            `max_body_bytes` exceeds `max_total_body_bytes`.
    """

    model_names: tuple[str, ...] = field(
        metadata=option(name="--served-model-name", nargs="+", metavar="NAME")
    )
    api_keys: tuple[str, ...] = field(
        default=(),
        metadata=option(name="--api-key", nargs="+", action="extend", metavar="KEY"),
    )
    metrics_key: str | None = field(default=None, metadata=option(metavar="KEY"))
    tool_call_parser: str | None = field(default=None, metadata=option(metavar="FORM"))
    prefix_cache_per_key: bool | None = field(default=None, metadata=option(bool))
    allowed_origins: tuple[str, ...] = field(
        default=(), metadata=option(nargs="+", metavar="ORIGIN")
    )
    allow_runtime_lora_updating: bool = field(default=False, metadata=option(bool))
    dev_mode: bool | None = field(default=None, metadata=option(bool))
    max_num_requests: int = field(default=1024, metadata=option(positive, metavar="N"))
    max_body_bytes: int = field(default=8 << 20, metadata=option(parse_bytes, metavar="BYTES"))
    max_total_body_bytes: int = field(
        default=256 << 20, metadata=option(parse_bytes, metavar="BYTES")
    )
    max_tokens: int | None = field(
        default=None, metadata=option(positive, name="--max-tokens-limit", metavar="TOKENS")
    )
    max_response_entries: int = field(default=1 << 20, metadata=option(positive, metavar="N"))
    max_stops: int = 16
    max_stop_chars: int = 256
    max_token_rules: int = 1 << 18
    max_salt_chars: int = 256
    body_seconds: float = 60.0
    send_seconds: float = 60.0
    grace_seconds: float = field(
        default=30.0,
        metadata=option(float, also=["--shutdown-timeout"], metavar="SECONDS"),
    )
    retry_seconds: int = 1

    def __post_init__(self) -> None:
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidRequestError(
                    f"allowed origin {shown(origin)} is none that a browser sends: write "
                    "scheme://host or scheme://host:port, in small letters and without a path, "
                    "several behind each other; 'null' for local files, or '*' for all"
                )
        if self.tool_call_parser is not None:
            from spectral_paged.openai import FORMS  # not before it is asked for: it loads torch

            if self.tool_call_parser not in FORMS:
                raise InvalidRequestError(
                    f"--tool-call-parser {shown(self.tool_call_parser)} is none of "
                    f"{', '.join(FORMS)}"
                )
        metrics_keys = () if self.metrics_key is None else (self.metrics_key,)
        for name, keys in (("an API", self.api_keys), ("the metrics", metrics_keys)):
            if not all(key.strip() == key != "" and key.isascii() for key in keys):
                raise InvalidRequestError(
                    f"{name} key is empty, begins or ends with a space, or is not ASCII: give "
                    "another"
                )
        if not (self.grace_seconds >= 0 and math.isfinite(self.grace_seconds)):
            raise InvalidRequestError(
                f"--grace-seconds is {self.grace_seconds}; it must be >= 0 and finite"
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
