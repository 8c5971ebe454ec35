"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from spectral_paged.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Names, keys and limits of a server.

    Args:
        model_names: what requests may call the model; answers use the first.
        api_keys: bearer tokens that open `/v1`; none: it is open to all.
        max_num_requests: completions (prompts times `n`) that run or wait at once; more are
            answered 429.
        max_body_bytes: longest body.
        max_total_body_bytes: of all bodies that arrive or wait to be parsed; more are answered 429.
        max_tokens: most tokens that one completion may ask for; None: as many as fit.
        max_stops: most stop strings, and stop token ids, of a request; each is looked for after
            every token.
        max_stop_chars: longest stop string.
        max_salt_chars: longest cache salt; every completion holds and hashes it.
        body_seconds: how long a body may take to arrive.
        send_seconds: how long a client may take nothing of its stream before it counts as gone.
        grace_seconds: how long requests may go on after the server was told to stop.
        retry_seconds: what `Retry-After` says where there is no room.

    Raises:
        InvalidRequestError: the longest body would never fit among all of them.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
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
        if self.max_total_body_bytes < self.max_body_bytes:
            raise InvalidRequestError(
                f"--max-total-body-bytes is {self.max_total_body_bytes}, less than "
                f"--max-body-bytes {self.max_body_bytes}: the longest body would never fit"
            )
