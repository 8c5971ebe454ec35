"""The distance between two sets of logits, in fp64, a few tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32  # tokens at a time, whose log-probabilities are 39 MB at a vocabulary of 152,000


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) in nats of each token, fp64 `[tokens]`, of logits `[tokens, vocab]`."""
    parts = []
    for a, b in zip(exact.split(CHUNK), other.split(CHUNK), strict=True):
        log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of `targets` `[tokens]` under logits `[tokens, vocab]`."""
    parts = []
    for rows, ids in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True):
        log_p = rows.double().log_softmax(-1)
        parts.append(-log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1))
    return torch.cat(parts)
