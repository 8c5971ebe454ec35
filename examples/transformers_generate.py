"""transformers' `generate` runs over spectral pages: a batch, streamed text, and a second turn."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TextStreamer

from spectral_paged.integrations.cached_attention import ATTENTION_NAME
from spectral_paged.integrations.transformers_cache import SpectralPagedCache
from spectral_paged.models.loader import load_model

TEXT = Path(__file__).parent / "texts" / "alice.txt"


def main() -> None:
    loaded = load_model("smollm2-135m", device=torch.device("cpu"), dtype=torch.float32)
    model, tokenizer = loaded.model, loaded.tokenizer
    model.set_attn_implementation(ATTENTION_NAME)
    cache = SpectralPagedCache(model, kv_cache_bytes=256 << 20, max_num_seqs=4, tokenizer=tokenizer)

    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = [TEXT.read_text(encoding="utf-8")[:3000], "The capital of France is"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 24, "do_sample": False, "past_key_values": cache}
    tokens = model.generate(**inputs, **options)
    for text in tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :]):
        print("...", text)
    stats = cache.stats()
    print(f"{stats['pages_sealed']} pages sealed, read {stats['pages_attended']} times")

    print("\nA conversation in one cache, streamed:")
    cache.reset()
    tokens = torch.empty(1, 0, dtype=torch.long)
    for question in ("Who was Isaac Newton?", "When was he born?"):
        turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        new = tokenizer(turn, return_tensors="pt")["input_ids"]
        tokens = torch.cat([tokens, new], dim=1)  # all tokens; generate computes only new ones
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True)
        tokens = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    print(cache)


if __name__ == "__main__":
    main()
