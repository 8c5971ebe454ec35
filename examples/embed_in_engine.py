"""A serving loop of its own uses the cache without the package's LLM, Engine and scheduler.

The forward pass is written out over a llama's weights. The loop admits requests, cuts prompts into
chunks, decodes, ends sequences and preempts the newest. `docs/embedding.md` has the contract.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from spectral_paged import SpectralKVCache
from spectral_paged.errors import CapacityError, NonFiniteError
from spectral_paged.rope import RotaryTable


def rms_norm(module, x):
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def llama_logits(model, table, cache, token_ids, positions, rows):
    """Return logits `[len(rows), vocab]` of the open step; token_ids, positions: int64 `[T]`."""
    x = model.model.embed_tokens(token_ids)
    for number, layer in enumerate(model.model.layers):
        heads, mlp, h = layer.self_attn, layer.mlp, rms_norm(layer.input_layernorm, x)
        projections = heads.q_proj, heads.k_proj, heads.v_proj
        q, k, v = (project(h).unflatten(-1, (-1, heads.head_dim)) for project in projections)
        q, k = (table.apply(part, positions).to(x.dtype) for part in (q, k))
        x = x + heads.o_proj(cache.attend(number, q, k, v).flatten(1))
        h = rms_norm(layer.post_attention_layernorm, x)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return model.lm_head(rms_norm(model.model.norm, x[rows]))


@dataclass
class Request:
    num_prompt_tokens: int
    token_ids: list[int]  # only ever appended to, because the cache reads the same list
    max_length: int
    preempted: bool = False


class ServingLoop:
    """Greedy continuous batching of a llama; a step computes up to `max_step_tokens` tokens."""

    def __init__(self, model, *, max_step_tokens=512, max_model_len=4096, **cache_options):
        config, rotary = model.config, model.model.rotary_emb
        self.model, self.max_step_tokens, self.eos = model, max_step_tokens, config.eos_token_id
        self.table = RotaryTable.from_inv_freq(
            rotary.inv_freq,
            max_positions=max_model_len,
            device=model.device,
            attention_scaling=rotary.attention_scaling,
        )
        self.cache = SpectralKVCache(
            num_layers=config.num_hidden_layers,
            num_q_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=2 * len(rotary.inv_freq),
            rope=self.table,
            device=model.device,
            dtype=model.dtype,
            **cache_options,
        )
        self.waiting, self.running = {}, {}  # Request by name, in order of arrival
        self.num_started, self.num_preempted, self.crowded = 0, 0, False

    def start(self, prompt, max_tokens=None):
        """Queue token ids; return the request's name, which its sequence has in the cache too."""
        longest = self.cache.max_sequence_tokens
        length = longest if max_tokens is None else len(prompt) + max_tokens
        if not 0 < len(prompt) < length <= longest:
            raise CapacityError(f"{len(prompt)} tokens to {length}: give 1 to {longest}")
        name, self.num_started = f"request-{self.num_started}", self.num_started + 1
        self.waiting[name] = Request(len(prompt), list(prompt), length)
        return name

    def release(self, name, *, forget=False):
        """End a request in any state; `forget`: keep its tokens out of the prefix cache."""
        if self.waiting.pop(name, None):
            self.cache.cancel_prefetch(name)
        if self.running.pop(name, None):
            self.cache.free(name, forget=forget)
            self.crowded = False

    @torch.inference_mode()
    def step(self):
        """Run one step; return new token ids by name, or the error of a request that failed."""
        plan = self._reserve()
        if not plan.entries:
            return {}
        flat, positions, rows, ready = [], [], [], []
        for entry in plan.entries:
            known, end = self.running[entry.seq_id].token_ids, entry.start + entry.num_new
            flat += known[entry.start : end]
            positions += range(entry.start, end)
            if end == len(known):  # all of it is computed: its next token is due
                ready.append(entry.seq_id)
                rows.append(len(flat) - 1)
        inputs = (torch.tensor(x, device=self.model.device) for x in (flat, positions))
        self.cache.begin_step(plan)
        try:
            logits = llama_logits(self.model, self.table, self.cache, *inputs, rows)
        except BaseException:
            self.cache.abort_step()  # none of its tokens count as stored
            raise
        failed = self.cache.end_step().failed
        finite = logits.isfinite().all(-1).tolist()  # the cache checks only tokens that it seals
        drawn = zip(ready, logits.argmax(-1).tolist(), finite, strict=True)
        results = {name: [token] if ok else NonFiniteError(name) for name, token, ok in drawn}
        for name, found in (results := results | failed).items():
            if isinstance(found, Exception):
                self.release(name, forget=True)
                continue
            request = self.running[name]
            request.token_ids += found
            if found[0] == self.eos or len(request.token_ids) == request.max_length:
                self.release(name)
        return results

    def _reserve(self):
        """Return the next plan: running requests, then as many waiting ones as there is room."""
        budget, wanted = self.max_step_tokens, {}
        for name in [*self.running, *self.waiting]:
            if budget and (name in self.running or self._admit(name)):
                due = len(self.running[name].token_ids) - self.cache.num_tokens(name)
                wanted[name] = min(due, budget, self.cache.chunk_limit(name))
                budget -= wanted[name]
        while (plan := self.cache.reserve(wanted)) is None:
            name, request = self.running.popitem()  # the newest; the oldest always fits
            self.cache.free(name)
            wanted.pop(name, None)
            self.waiting = {name: request, **self.waiting}
            request.preempted = self.crowded = True
            self.num_preempted += 1
        return plan

    def _admit(self, name):
        new = self.waiting[name]
        prompt = {"num_prompt_tokens": new.num_prompt_tokens, "token_ids": new.token_ids}
        # a crowded cache would preempt it at once; without `prefetch` nothing comes from the store
        ready = not (self.crowded and self.running) and self.cache.prefetch(name, **prompt)
        if not ready or self.cache.add_sequence(name, **prompt, resumed=new.preempted) is None:
            return False  # the cache has max_num_seqs sequences
        self.running[name] = self.waiting.pop(name)
        return True


def main(model="smollm2-135m", kv_format="spectral-page", max_tokens=16):
    from spectral_paged.models.loader import load_model

    loaded = load_model(model, device=torch.device("cpu"), dtype=torch.float32)
    story = (Path(__file__).parent / "texts" / "alice.txt").read_text(encoding="utf-8")
    prompts = [story[:3600], "The capital of France is", story[:4200], "Two and two make"]
    loop = ServingLoop(loaded.model, format=kv_format, kv_cache_bytes=72 << 20, max_num_seqs=4)
    texts = {}
    for prompt in prompts:
        texts[loop.start(loaded.tokenizer(prompt)["input_ids"], max_tokens)] = prompt[-40:], []
    while loop.waiting or loop.running:
        for name, found in loop.step().items():
            texts[name][1].extend([] if isinstance(found, Exception) else found)
    for name, (end, token_ids) in texts.items():
        print(f"{name}: ...{end!r} -> {loaded.tokenizer.decode(token_ids)!r}")
    loop.cache.check_integrity()
    for figure, value in {"preemptions": loop.num_preempted, **loop.cache.stats()}.items():
        print(f"{figure:24} {value}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
