"""Writing of a GGUF file's tensors as safetensors, each in the smallest type without loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from spectral_paged.errors import CorruptFileError, UnsupportedModelError
from spectral_paged.models.gguf.architectures import Architecture
from spectral_paged.models.gguf.file import GGUFFile
from spectral_paged.models.gguf.keys import REMEDY, names
from spectral_paged.models.gguf.rope import FACTORS

SHARD_BYTES = 4 << 30


def check_tensors(file: GGUFFile, architecture: Architecture, config: Any) -> dict[str, str]:
    """Check that the file has exactly the model's tensors; returns transformers' name of each.

    Raises:
        CorruptFileError: a tensor is missing, or its shape differs from the keys'.
        UnsupportedModelError: a tensor is not one of the model, or no model can be made of the
            keys.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # sizes that do not fit raise in any layer, each in its own way
        raise UnsupportedModelError(
            f"{file.path}: no {config.model_type} can be made of its keys "
            f"({' '.join(str(error).split()):.200}): {REMEDY}"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    found = {architecture.gguf_name(name): name for name in wanted}
    if missing := [name for name in found if name not in file.tensors]:
        raise CorruptFileError(
            f"{file.path} lacks {len(missing)} of its model's {len(wanted)} tensors "
            f"({names(missing)}): if it is one part of several, join all of them "
            "(llama-gguf-split --merge FIRST OUT); else fetch it again"
        )
    unknown = [name for name in file.tensors if name not in found and name != FACTORS]
    if unknown:
        raise UnsupportedModelError(
            f"{file.path} has {len(unknown)} tensors that its model does not use here "
            f"({names(unknown)}), so that it would compute something else: {REMEDY}"
        )
    for name, target in found.items():
        if file.tensors[name].shape != wanted[target]:
            raise CorruptFileError(
                f"{file.path}: tensor {name} has shape {list(file.tensors[name].shape)}; its keys "
                f"say {list(wanted[target])}: fetch it again, or {REMEDY}"
            )
    return found


def write_weights(
    file: GGUFFile, architecture: Architecture, config: Any, targets: dict[str, str], folder: Path
) -> torch.dtype:
    """Write safetensors of at most about 4 GiB each, and an index where there are several.

    Returns:
        The dtype that holds all tensors without loss: their common dtype, or fp32.
    """
    shards: list[list[str]] = []
    dtypes = set()
    for shard in _shards(file, architecture, config, targets):
        dtypes |= {tensor.dtype for tensor in shard.values()}
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SAFE_WEIGHTS_NAME)
    else:
        index: dict[str, str] = {}
        for number, held in enumerate(shards):
            name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"{number}.part").rename(folder / name)
            index |= dict.fromkeys(held, name)
        content = {"metadata": {}, "weight_map": index}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(content))
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _shards(
    file: GGUFFile, architecture: Architecture, config: Any, targets: dict[str, str]
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, target in targets.items():
        values = architecture.converted(name, file.read(name), config)
        tensor = smallest(torch.from_numpy(values.copy()))
        if shard and held + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[target] = tensor
        held += tensor.nbytes
    yield shard


def smallest(tensor: Tensor) -> Tensor:
    """An fp32 tensor in bf16 or fp16 where that loses nothing, else itself."""
    for dtype in (torch.bfloat16, torch.float16):
        small = tensor.to(dtype)
        if torch.equal(small.float(), tensor):
            return small
    return tensor
