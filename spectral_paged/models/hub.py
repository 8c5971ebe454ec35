"""A model's name that is no path: it is compared with what is known, then the hub is asked once.

transformers asks for every file again, five times where nobody answers. So nothing but one question
with a short limit decides whether a name exists, and what is kept of it serves without a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx  # the one that it asks with: httpx2 since its release 2

from spectral_paged.errors import UnknownModelError, shown

HUB_SECONDS = 5.0  # for the hub's answer
CONFIG = "config.json"
LIKE = 0.8  # a name this like an alias is a typing error


def looks_like_a_path(name: str) -> bool:
    """Return whether a name is no hub id, which is `name` or `owner/name`."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name


def did_you_mean(name: str, aliases: Iterable[str]) -> str:
    """Return a note of an alias or a local path that is like `name`; "" if there is none."""
    path = Path(name).expanduser()
    try:
        beside = [f.name for f in path.parent.iterdir() if f.is_dir() or f.suffix == ".gguf"]
    except OSError:
        beside = []
    found = like(name, aliases) or [
        str(path.parent / near) for near in get_close_matches(path.name, beside, n=1)
    ]
    return f"; did you mean {shown(found[0])}?" if found else ""


def like(name: str, aliases: Iterable[str]) -> list[str]:
    """Return the alias of which `name` is a misspelling, if there is one."""
    return get_close_matches(name.lower(), list(aliases), n=1, cutoff=LIKE)


def find_on_hub(name: str, aliases: Iterable[str]) -> str:
    """Return `name` if the hub has it, or the folder that is kept of it if the hub is not reached.

    Raises:
        UnknownModelError: the hub has no such model, or cannot be reached and nothing is kept.
    """
    kept = kept_folder(name)
    if kept is None and (near := like(name, aliases)):
        raise UnknownModelError(f"unknown model {shown(name)}: did you mean {shown(near[0])}?")
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=HUB_SECONDS)
    except GatedRepoError:
        return name  # it exists; loading it says what is to be agreed to
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownModelError(
            f"unknown model {shown(name)}: it is no alias ({', '.join(aliases)}), no folder, no "
            f".gguf file, and the hub at {constants.ENDPOINT} has no such model that you may see"
            f"{did_you_mean(name, aliases)}"
        ) from error
    except EntryNotFoundError as error:
        raise UnknownModelError(
            f"{shown(name)} on the hub has no {CONFIG}, so it holds no model of transformers"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        if kept is not None:
            return kept
        why = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else shown(error)
        raise UnknownModelError(
            f"model {shown(name)} is no alias ({', '.join(aliases)}), no folder and no .gguf file, "
            f"nothing of it is kept from earlier, and the hub at {constants.ENDPOINT} cannot be "
            f"reached ({why}): go online, or name a local folder{did_you_mean(name, aliases)}"
        ) from error
    return name


def kept_folder(name: str) -> str | None:
    """Return the folder in which files of a hub model are kept; None: there is none."""
    try:
        found = try_to_load_from_cache(name, CONFIG)
    except HFValidationError:
        return None
    return os.path.dirname(found) if isinstance(found, str) else None
