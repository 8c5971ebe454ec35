"""A digest of all that a model computes K and V from: its weights, bit by bit, and its config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_paged.models.stored_tensors import stored_tensors
from spectral_paged.rope import RotaryTable

CHUNK = 1 << 22  # numbers of 8 bytes that are summed at a time
ROTARY_ROWS = 64  # as many fix the frequencies of a table
# what a config says of files and versions, and not of the model
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")


def weights_digest(model: Any, ropes: Sequence[RotaryTable | None]) -> str:
    """64 hex digits of a model's config, weights, buffers and rotary tables.

    Two models have one digest only if every weight has the same bits, whatever files they came
    from. Weights are summed up on their device, so this takes about as long as reading them once.
    """
    config = model.config.to_dict()
    said = {key: config[key] for key in sorted(config) if key not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in stored_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sum(tensor)}".encode())
    for rope in ropes:
        for table in () if rope is None else (rope.cos, rope.sin):
            digest.update(table[:ROTARY_ROWS].cpu().contiguous().numpy().tobytes())
        digest.update(b"next")
    return digest.hexdigest()


def _sum(tensor: Tensor) -> int:
    """A weighted sum of a tensor's bytes in numbers of 64 bits; every weight is odd, so each bit
    of a number counts."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    rest = -len(flat) % 8
    if rest:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start, numbers in enumerate(flat.view(torch.int64).split(CHUNK)):
        places = torch.arange(len(numbers), device=flat.device) + start * CHUNK
        odd = (places * -7046029254386353131) | 1  # the golden ratio in 64 bits spreads places
        total += (numbers * odd).sum()
    return int(total)
