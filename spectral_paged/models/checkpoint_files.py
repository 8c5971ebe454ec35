"""A checkpoint's files are checked before loading: safetensors only, and no path outside it.

Checkpoints come from third parties. Pickled weights run code when they are loaded, and an index
that names `../../x` would read a file outside the model. Both are refused before anything is
loaded.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from spectral_paged.errors import CorruptFileError, UnsupportedModelError
from spectral_paged.file_limits import (
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    MAX_TOKENIZER_BYTES,
    check_file,
)
from spectral_paged.models.quantized_weights import check_config, check_tensors, tensor_names

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SIZES = {
    "config.json": MAX_CONFIG_BYTES,
    "tokenizer_config.json": MAX_CONFIG_BYTES,
    "generation_config.json": MAX_CONFIG_BYTES,
    "tokenizer.json": MAX_TOKENIZER_BYTES,
}


def find_file(where: str, name: str) -> Path | None:
    """Return the path of a model's file in its folder, or downloaded once from the hub.

    None: there is no such file, or the hub cannot be reached.
    """
    if Path(where).is_dir():
        path = Path(where) / name
        return path if path.is_file() else None
    try:
        found = cached_file(where, name)
    except OSError:
        return None
    return None if found is None else Path(found)


def check_sizes(where: str, *names: str) -> None:
    """Refuse a model whose config or tokenizer files are larger than their limits.

    Raises:
        CorruptFileError: a file is too large; the message states its limit.
    """
    for name in names or tuple(SIZES):
        if (path := find_file(where, name)) is not None:
            check_file(path, SIZES[name], f"a model's {name}")


def refuse_pickle(path: Path) -> None:
    """Refuse a path that names a weights file in place of a folder.

    Raises:
        UnsupportedModelError: the file is a pickle, or a safetensors file.
    """
    if path.suffix in PICKLES:
        raise UnsupportedModelError(_pickle_message(f"{path} is a pickle"))
    if path.suffix == ".safetensors":
        raise UnsupportedModelError(
            f"{path} is a weights file alone: name its folder, which holds config.json too"
        )


def _pickle_message(what: str) -> str:
    return (
        f"{what}: loading one runs whatever code is in it, so weights are read from safetensors "
        "and GGUF only. Take the model's safetensors files, or convert it where you trust it: "
        "model.save_pretrained(folder) writes them"
    )


def check_checkpoint(where: str, config: Any) -> None:
    """Refuse a model whose weights are not all safetensors files of its own that can be read.

    Args:
        where: folder or hub id.
        config: the model's transformers config, which may name the weights.

    Raises:
        UnsupportedModelError: the weights are quantized, there are pickled ones only, or there is
            an adapter.
        CorruptFileError: there are no weights, or their index is damaged or names a file outside
            the model.
    """
    if find_file(where, "adapter_config.json") is not None:
        raise UnsupportedModelError(
            f"{where} holds an adapter (adapter_config.json): merge it into its model, or load it "
            "yourself and give it to LLM.from_model"
        )
    check_config(where, config)
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        _check_name(named, f"config.json in {where}", (".safetensors", ".safetensors.index.json"))
    for name in [named] if named is not None else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        path = find_file(where, name)
        if path is not None:
            if name.endswith(".json"):
                check_tensors(where, check_index(path), config)
            else:
                check_tensors(where, tensor_names(path), config)
            return
    folder = Path(where)
    held = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in held if name.endswith(PICKLES)]
    if pickles:
        raise UnsupportedModelError(_pickle_message(f"{where} has only pickles ({pickles[0]})"))
    raise CorruptFileError(
        f"{where} has no {named or SAFE_WEIGHTS_NAME} and no index of one: fetch them again, or "
        "take a model with safetensors weights"
    )


def check_index(path: Path) -> list[str]:
    """Refuse a safetensors index that names anything but safetensors files in its folder.

    Returns the names of the tensors.

    Raises:
        CorruptFileError: the index is damaged, or a name is refused; the message has the name.
    """
    check_file(path, MAX_INDEX_BYTES, "a safetensors index")
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        files = set(places.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(
            f"{path} is no safetensors index ({error!r}): fetch it again"
        ) from error
    for name in files:
        _check_name(name, str(path), (".safetensors",))
    return list(places)


def _check_name(name: object, source: str, endings: tuple[str, ...]) -> None:
    """Check a file name that a model's file contains.

    Links are not resolved, because the hub's cache consists of links.
    """
    inside = isinstance(name, str) and not (
        PurePosixPath(name).is_absolute()
        or ".." in PurePosixPath(name).parts
        or set(name) & set("\\:\0")
    )
    if not inside:
        raise CorruptFileError(
            f"{source} names the weights file {name!r}, which is outside the model's folder: do "
            "not use this model"
        )
    if not str(name).endswith(endings):
        raise CorruptFileError(
            f"{source} names the weights file {name!r}; weights are read from safetensors only: "
            "fetch the model's safetensors files"
        )
