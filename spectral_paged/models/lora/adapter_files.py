"""A LoRA adapter in a folder that PEFT saved, read or refused by name.

```
adapter_config.json        rank, alpha, and what else was trained
adapter_model.safetensors  base_model.model.<layer>.lora_A.weight  [r, in]
                           base_model.model.<layer>.lora_B.weight  [out, r]
```
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from spectral_paged.errors import AdapterError, SpectralPagedError, cut, shown
from spectral_paged.file_limits import MAX_CONFIG_BYTES, check_file
from spectral_paged.models.lora.adapter_config import MERGE, AdapterConfig, check_rank
from spectral_paged.models.lora.adapter_weights import AdapterWeights, LayerAdapter, check_pair

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes of tensors, as safetensors names them
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def check_folder(name: str, path: str, max_lora_rank: int) -> AdapterConfig:
    """Return the config of an adapter in a folder, or refuse it before tensors are read.

    Raises:
        AdapterError: there is no adapter, a file cannot be read, or what it is is not served.
    """
    folder = _folder(path)
    if not os.path.isdir(folder):
        raise AdapterError(
            f"adapter {shown(name)}: there is no folder {shown(path)}: fetch it first (`hf "
            "download NAME --local-dir FOLDER`) and name the folder"
        )
    if not os.path.isfile(folder / CONFIG):
        raise AdapterError(
            f"adapter {shown(name)}: folder {shown(path)} has no {CONFIG}: name the folder that "
            "PEFT's save_pretrained wrote"
        )
    try:
        check_file(folder / CONFIG, MAX_CONFIG_BYTES, "a config")
        config = from_json((folder / CONFIG).read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, SpectralPagedError) as error:
        raise AdapterError(
            f"adapter {shown(name)}: {CONFIG} in {shown(path)} cannot be read "
            f"({cut(str(error))}): fetch it again"
        ) from error
    found = AdapterConfig.of(name, config, max_lora_rank)
    if not os.path.isfile(folder / WEIGHTS):
        pickled = os.path.isfile(folder / PICKLE)
        raise AdapterError(
            f"adapter {shown(name)}: folder {shown(path)} has no {WEIGHTS}"
            + (
                f", but a {PICKLE}, whose code would run: load it with PEFT, and save it with "
                "save_pretrained"
                if pickled
                else ": fetch it again"
            )
        )
    return found


def _folder(path: str) -> Path:
    """Return a path whose `~` is somebody's home; that of nobody stays, and no folder has it."""
    return Path(os.path.expanduser(path))


def read_folder(name: str, path: str, max_lora_rank: int) -> AdapterWeights:
    """Read an adapter; its tensors are on the CPU.

    Raises:
        AdapterError: as `check_folder`, or its tensors are damaged or are not of LoRA alone.
    """
    config = check_folder(name, path, max_lora_rank)
    try:
        with safe_open(_folder(path) / WEIGHTS, framework="pt") as file:
            keys = _pairs(name, file)
            for where, pair in keys.items():
                _check_tensors(name, where, file, pair, config, max_lora_rank)
            layers = {
                where: LayerAdapter(
                    file.get_tensor(pair["A"]), file.get_tensor(pair["B"]), config.scale_of(where)
                )
                for where, pair in keys.items()
            }
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"adapter {shown(name)}: {WEIGHTS} in {shown(path)} cannot be read "
            f"({cut(str(error))}): fetch it again"
        ) from error
    return AdapterWeights.of(name, layers)


def _pairs(name: str, file: Any) -> dict[str, dict[str, str]]:
    """Return the names of the tensors A and B of each layer in a file.

    Raises:
        AdapterError: there are others, or one of a pair is missing.
    """
    pairs: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118 (the file is no mapping)
        match = _TENSOR.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"adapter {shown(name)} has tensor {shown(key)}, and A and B of linear "
                f"layers are served: {MERGE}"
            )
        pairs.setdefault(match[1], {})[match[2]] = key
    for where, pair in pairs.items():
        if len(pair) < 2:
            raise AdapterError(
                f"adapter {shown(name)} has one of A and B in {cut(where)}: fetch it again"
            )
    return pairs


def _check_tensors(
    name: str,
    where: str,
    file: Any,
    pair: dict[str, str],
    config: AdapterConfig,
    max_lora_rank: int,
) -> None:
    """Refuse the tensors of a layer by their dtypes and shapes, before they are read.

    Raises:
        AdapterError: they are no A and B of floats, or have another rank than the config says.
    """
    a, b = (file.get_slice(pair[part]) for part in "AB")
    for part in (a, b):
        if part.get_dtype() not in FLOATS:
            raise AdapterError(
                f"adapter {shown(name)} has {part.get_dtype()} numbers in {cut(where)}, and "
                f"{', '.join(FLOATS)} are served: save it in one of those"
            )
    rank = check_pair(name, where, a.get_shape(), b.get_shape())
    check_rank(name, rank, max_lora_rank)
    if rank != config.rank_of(where):
        raise AdapterError(
            f"adapter {shown(name)} has rank {rank} in {cut(where)}, and rank "
            f"{config.rank_of(where)} there by its {CONFIG}: fetch it again"
        )
