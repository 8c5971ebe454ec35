"""LoRA adapters of the tiny model as PEFT saves them, and the model with one merged into it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from spectral_paged import SamplingParams
from support.tiny_model import random_prompts, tiny_llm, tiny_model

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# by name: ranks, targets and scales differ
KINDS = {
    "low": {"rank": 1, "alpha": 4, "targets": ("q_proj", "v_proj")},
    "all": {"rank": 7, "alpha": 8, "targets": ALL_LINEAR},
    "root": {"rank": 16, "alpha": 2, "targets": ("k_proj", "down_proj"), "use_rslora": True},
}


def save_adapter(
    folder, *, model=None, seed=0, rank=4, alpha=8, targets=("q_proj", "v_proj"), **config
):
    """Write a random adapter into `folder`, and return its path as a string.

    Args:
        model: whose it is, default the tiny model.
        config: further fields of PEFT's config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in (model or tiny_model()).named_modules():
        if name.rpartition(".")[2] in targets:
            rows, columns = module.weight.shape
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / 4
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 4
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return str(folder)


def save_kinds(folder):
    """Write an adapter of each of `KINDS`; returns their paths by name."""
    return {
        name: save_adapter(Path(folder) / name, seed=seed, **kind)
        for seed, (name, kind) in enumerate(KINDS.items())
    }


def merged_model(folder):
    """The tiny model whose weights have the adapter of a folder in them; None: as it is."""
    from safetensors.torch import load_file

    model = tiny_model()
    if folder is None:
        return model
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            with torch.no_grad():
                weight = model.get_submodule(name).weight
                weight += config["lora_alpha"] / rank * (b @ a)
    return model


def greedy(model, prompts, count):
    """The next `count` tokens of each prompt by transformers' own `generate`."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


NAMES = [None, *KINDS]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8)
PROMPTS = random_prompts([5, 70, 600, 9, 33, 1200, 1, 64], seed=5)


def lora_llm(format="exact", **options):
    """A small LLM with room for three adapters."""
    return tiny_llm(format, **{"enable_lora": True, "max_loras": 3} | options)


def tokens(outputs):
    """The token ids of each output's first completion."""
    return [output.outputs[0].token_ids for output in outputs]


def unused(llm):
    """True if no request holds an adapter."""
    return not any(adapter.num_requests for adapter in llm.adapters._by_name.values())
