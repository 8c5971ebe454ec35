"""Unsloth's own model code on a CPU: stand-ins for its GPU, models, and a fixture to patch them.

Import before anything of Unsloth; the stand-ins stay until the process ends.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import tempfile
from pathlib import Path

# Unsloth would write its compiled files into the working folder.
COMPILED = tempfile.TemporaryDirectory(prefix="unsloth-compiled-")
os.environ |= {
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_INTERPRET": "1",
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_COMPILE_LOCATION": COMPILED.name,
}

# isort: off
import unsloth  # noqa: E402, F401  before transformers, as Unsloth demands
from unsloth.models import llama  # noqa: E402
import torch  # noqa: E402
import pytest  # noqa: E402
from support.unsloth_checkpoints import checkpoint  # noqa: E402
from spectral_paged.integrations.unsloth.checkpoints import load_fast  # noqa: E402
from spectral_paged.integrations.unsloth import patch_unsloth_attention  # noqa: E402
from spectral_paged.integrations.unsloth.families import fast_functions, fast_modules  # noqa: E402
# isort: on

CHECKPOINTS = tempfile.TemporaryDirectory(prefix="unsloth-")


def everywhere(name, value):
    """Set the global `name` in each of Unsloth's modules that has it."""
    for module in list(sys.modules.values()):
        package = getattr(module, "__name__", "").partition(".")[0]
        if package in ("unsloth", "unsloth_zoo") and name in vars(module):
            setattr(module, name, value)


def rope(q, k, cos, sin, position_ids=None):
    """`fast_rope_embedding` in torch; its Triton kernel takes seconds in the interpreter."""
    rows = slice(q.shape[-2]) if position_ids is None else position_ids.long()
    cos, sin = cos.squeeze()[rows], sin.squeeze()[rows]
    if position_ids is not None:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = q.shape[-1] // 2
    return tuple(x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin for x in (q, k))


def norm(layernorm, x, gemma=False, **_):
    """`fast_rms_layernorm` in torch, for the same reason."""
    epsilon = getattr(layernorm, "variance_epsilon", None) or layernorm.eps
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + epsilon)
    return (y * (layernorm.weight.float() + gemma)).to(x.dtype)


def build_rope_cache(self, device_index):
    size = self.current_rope_size
    with self._rope_build_mode():
        self._set_cos_sin_cache(
            seq_len=self._rope_cache_rows(),
            device=torch.device("cpu", 0),
            dtype=self._rope_cache_dtype,
        )
    self.current_rope_size = size
    self._rope_cache_versions[device_index] = self._rope_cache_version


ensure_rope_cache = llama._PerDeviceRopeCache._ensure_rope_cache
llama._PerDeviceRopeCache._build_rope_cache = build_rope_cache
llama._PerDeviceRopeCache._ensure_rope_cache = lambda self, index: ensure_rope_cache(
    self, 0 if index is None else index
)
everywhere("DEVICE_COUNT", 1)
everywhere("DEVICE_TYPE_TORCH", "cpu")
everywhere("get_device_stats", lambda *a, **k: ("CPU", "", 0.0))
everywhere("get_current_device", lambda: torch.device("cpu"))
everywhere("verify_fp8_support_if_applicable", lambda *a, **k: None)
everywhere("torch_gpu_device", lambda device: contextlib.nullcontext())
everywhere("fast_rope_embedding", rope)
everywhere("fast_rms_layernorm", norm)
gc.freeze()  # each load collects garbage several times, which would scan all these imports


def load(folder, dtype=torch.float32):
    """The model that Unsloth loads from a checkpoint, without adapters."""
    return load_fast(folder, dtype=dtype, max_seq_length=4096, device="cpu")


@functools.cache
def model_of(family, **changes):
    folder = Path(CHECKPOINTS.name) / family
    return load(checkpoint(folder, family, **changes))


@pytest.fixture
def patched():
    """A function that patches a model with a small poisoned pool; patches are undone at the end."""
    models = []

    def patch(model, **options):
        defaults = {
            "kv_cache_bytes": 32 << 20,
            "max_num_seqs": 8,
            "verbose": False,
            "debug_poison": True,
        }
        models.append(patch_unsloth_attention(model, **(defaults | options)))
        return models[-1]

    yield patch
    for model in models:
        model.undo()


def functions_now():
    """The present value of every reference to a function that patching replaces, by name."""
    return {
        f"{module.__name__}.{name}": vars(module).get(name)
        for module in fast_modules()
        for name in fast_functions()
    }
