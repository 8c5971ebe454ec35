"""A replay that copies from its context, texts for it, and methods of known damage."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from spectral_paged.benchmarks.quality import tasks, texts
from spectral_paged.benchmarks.quality.tasks import Haystack

VOCAB = 160


@dataclass(frozen=True)
class Noise:
    """A method that adds noise of size `damage` to logits; above 1 the facts are lost too."""

    name: str
    damage: float
    family: str = "int"
    num_landmark_tokens: int = 64
    hot_tokens: int = 64

    def bytes_per_token(self, head_dim):
        return 4 * head_dim / 2

    def rebuild(self, layer, k, v, cos, sin):
        return k, v


class CopyingReplay:
    """A replay that completes a prompt with the text that follows it in the context."""

    def __init__(self):
        self.geometry = SimpleNamespace(head_dim=16, num_layers=2)
        self.model = SimpleNamespace(device=torch.device("cpu"))
        self.prefills = 0

    def prefill(self, ids, keep_queries=False):
        self.prefills += 1
        return SimpleNamespace(ids=list(ids), damage=0.0)

    def seal(self, context, method):
        return SimpleNamespace(ids=context.ids, damage=getattr(method, "damage", 0.5))

    def prefill_through(self, ids, method, segment):
        return SimpleNamespace(ids=list(ids), damage=method.damage * 2)

    def logits(self, context, ids):
        g = torch.Generator().manual_seed(sum(context.ids) % 1000)
        clean, noise = (torch.randn(*ids.shape, VOCAB, generator=g) for _ in range(2))
        return clean + context.damage * noise

    def generate(self, context, prompts, max_tokens, eos=None):
        text = "".join(map(chr, context.ids))
        outputs = []
        for prompt in prompts:
            line = "".join(map(chr, prompt)).split("\n")[-1]
            line = line.removeprefix("Recall: ").removeprefix("Summary: ").removeprefix("Answer: ")
            at = text.find(line) + len(line) if line in text else 0
            answer = text[at : at + max_tokens] if context.damage <= 1 else "?" * max_tokens
            outputs.append([ord(c) for c in answer.ljust(max_tokens)])
        return outputs


def windows(count=4):
    return tasks.continuation_windows(haystack(), 1024, count, num_continuation=16)


MILD, HARD = Noise("mild", 0.1), Noise("hard", 2.0)


def quiet(_):
    return None


class Characters:
    """A tokenizer of one token a character, with one special token before every text."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def haystack(genres=("fiction", "code"), num_chars=9000, max_tokens=8192):
    bodies = {g: "".join(f"{g} {i} is gold. " for i in range(num_chars // 16)) for g in genres}
    return Haystack([texts.Text(g, g, b) for g, b in bodies.items()], Characters(), max_tokens)
