"""A script that writes `qwen_biased_head.safetensors`, for kernel tests on scores of hundreds.

`python capture_qwen.py MODEL TEXT` captures a head of Qwen2.5-Coder-1.5B whose keys have a large
bias: the first block behind 64 landmarks, post-RoPE keys and V, and the queries of the tokens that
follow it, fp16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AttentionInterface

from spectral_paged.models.loader import load_model

FIRST, TOKENS, QUERIES = 64, 512, 4


def main(model_name, text):
    loaded = load_model(model_name, device=torch.device("cpu"), dtype=torch.float32)
    seen = {}

    def attention(module, query, key, value, mask, **options):
        seen[module.layer_idx] = (query[0], key[0], value[0])
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("capture", attention)
    loaded.model.set_attn_implementation("capture")
    ids = loaded.tokenizer(Path(text).read_text())["input_ids"][: FIRST + TOKENS + QUERIES]
    with torch.inference_mode():
        loaded.model.model(input_ids=torch.tensor([ids]), use_cache=False, attention_mask=None)
    best = None
    for layer, (q, k, v) in seen.items():
        for head in range(len(k)):
            own = q.unflatten(0, (len(k), -1))[head, :, -QUERIES:]
            keys = k[head, FIRST : FIRST + TOKENS]
            largest = float((own @ keys.mT).abs().max()) * k.shape[-1] ** -0.5
            if best is None or largest > best[0]:
                best = (largest, layer, head, own, keys, v[head, FIRST : FIRST + TOKENS])
    largest, layer, head, q, k, v = best
    print(f"layer {layer}, head {head}: scores up to {largest:.0f}")
    save_file(
        {n: x.half().contiguous() for n, x in (("q", q.transpose(0, 1)), ("k", k), ("v", v))},
        Path(__file__).with_name("qwen_biased_head.safetensors"),
        {
            "model": Path(model_name).stem,
            "layer": str(layer),
            "head": str(head),
            "first_position": str(FIRST),
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
