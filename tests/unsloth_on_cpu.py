"""Unsloth's own model code on a CPU in fp32: what stands in for its GPU, and tiny models of every
family that it loads. Import before anything of Unsloth; it stays in this process."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile

os.environ |= {
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_INTERPRET": "1",
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp(prefix="unsloth-compiled-"),  # not the folder here
}

# isort: off
from unsloth import FastLanguageModel  # noqa: E402  before transformers, as it asks for
from unsloth.models import llama  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from spectral_paged.benchmarks.unsloth_models import load_fast, save_checkpoint  # noqa: E402
# isort: on

VOCAB_SIZE = 199
FIELDS = {
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 128, "attn_logit_softcapping": 3.0},
}


def everywhere(name, value):
    """Set a global of that name in each of Unsloth's modules that has one."""
    for module in list(sys.modules.values()):
        package = getattr(module, "__name__", "").partition(".")[0]
        if package in ("unsloth", "unsloth_zoo") and name in vars(module):
            setattr(module, name, value)


def rope(q, k, cos, sin, position_ids=None):
    """What `fast_rope_embedding` computes; its Triton kernel takes seconds in the interpreter."""
    rows = slice(q.shape[-2]) if position_ids is None else position_ids.long()
    cos, sin = cos.squeeze()[rows], sin.squeeze()[rows]
    if position_ids is not None:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = q.shape[-1] // 2
    return tuple(
        x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin for x in (q, k)
    )


def norm(layernorm, x, gemma=False, **_):
    """What `fast_rms_layernorm` computes, for the same reason."""
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
gc.freeze()  # loading collects garbage several times over all that is imported here


def checkpoint(folder, family, **changes):
    """Save a tiny random model of `family` in `folder`.

    Weights are scaled up so that continuations vary and depend on far tokens.
    """
    fields = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1,
        "pad_token_id": 0, "dtype": "float32",
    }  # fmt: skip
    config = AutoConfig.for_model(family, **(fields | FIELDS.get(family, {}) | changes))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    save_checkpoint(model, folder)
    return folder


def load(folder, dtype=torch.float32):
    """The model that Unsloth makes of a checkpoint, without adapters."""
    return load_fast(folder, dtype=dtype, max_seq_length=4096, device="cpu")


def adapters(model):
    """`model` with random adapters of rank 4 on every projection."""
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=8, lora_dropout=0.0, bias="none", use_gradient_checkpointing=False,
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
    )  # fmt: skip
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model
