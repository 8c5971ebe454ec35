"""Bearer tokens of requests are compared with the keys of the server."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence

from spectral_paged.server.api_error import ApiError


def check_key(headers: Mapping[str, str], keys: Sequence[str], what: str) -> str:
    """Return the key that a request gives.

    Args:
        headers: the request's headers, with lower-case names.
        keys: those of which the request must give one.
        what: the kind of key, for the message.

    Raises:
        ApiError: 401, the request gives no key or another one.
    """
    kind, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip().encode()
    known = [key for key in keys if secrets.compare_digest(given, key.encode())]
    if kind.lower() != "bearer" or not known:
        raise ApiError(
            401,
            f"the {what} key is missing or wrong: send 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return known[0]


def salt_of(key: str, cache_salt: str) -> str:
    """Return the cache salt of a key's requests, joined with the salt that a request names.

    The digest has 64 characters whatever the key, so no salt spells another key's.
    """
    return f"{hashlib.sha256(key.encode()).hexdigest()}{cache_salt}"
