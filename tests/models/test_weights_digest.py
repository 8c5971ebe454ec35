"""A model's digest changes with every bit of its weights, and with nothing else."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from spectral_paged.models.weights_digest import weights_digest
from support.cache_feed import ROPE
from support.tiny_model import tiny_model

ROPES = [ROPE, None]


def test_one_model_has_one_digest():
    one, two = tiny_model(), tiny_model()
    two.config._name_or_path = "/elsewhere"
    assert weights_digest(one, ROPES) == weights_digest(two, ROPES)


def test_every_bit_counts():
    model = tiny_model()
    seen = {weights_digest(model, ROPES)}
    pick = random.Random(0)
    parameters = [p for _, p in sorted(model.named_parameters())]
    for _ in range(40):
        numbers = pick.choice(parameters).data.view(-1).view(torch.int32)
        place = pick.randrange(len(numbers))
        numbers[place] ^= 1 << pick.randrange(31)
        seen.add(weights_digest(model, ROPES))
    assert len(seen) == 41


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_the_order_of_weights_counts(size):
    class Model:
        config = tiny_model().config

        def __init__(self, values):
            self.values = torch.tensor(values, dtype=torch.uint8)

        def named_parameters(self):
            return [("w", self.values)]

        def named_buffers(self):
            return []

        def named_modules(self):
            return []

    one = list(range(1, size + 1))
    digests = {weights_digest(Model(v), ()) for v in (one, one[::-1], [*one, 0])}
    assert len(digests) == (2 if size == 1 else 3)


@pytest.mark.parametrize("change", ["config", "dtype", "rope", "name"])
def test_what_else_k_and_v_depend_on_counts(change):
    model, ropes = copy.deepcopy(tiny_model()), ROPES
    before = weights_digest(model, ropes)
    if change == "config":
        model.config.rms_norm_eps *= 2
    elif change == "dtype":
        model = model.bfloat16()
    elif change == "rope":
        ropes = [None, ROPE]
    else:
        model.model.extra = torch.nn.Parameter(torch.zeros(0))
    assert weights_digest(model, ropes) != before
