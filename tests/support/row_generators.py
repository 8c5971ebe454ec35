"""Both `generate` integrations over a model on the CPU, behind one face."""

from __future__ import annotations

import logging

import torch

from spectral_paged import CacheOptions
from spectral_paged.integrations.unsloth.generation import PatchedForward, SpectralPast
from spectral_paged.models.cache_for_model import model_cache
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from support.padded_batch import attending_model, generated, paged_cache
from support.tiny_model import tiny_format, tiny_model


class TransformersRows:
    """A tiny llama over a `SpectralPagedCache`."""

    def __init__(self, format="exact", **options):
        self.model = attending_model()
        self.cache = paged_cache(self.model, _format(format), **options)

    @property
    def kv_cache(self):
        return self.cache.kv_cache

    def generate(self, inputs, **options):
        self.cache.reset()
        return generated(self.model, inputs, self.cache, **options)

    @torch.no_grad()
    def forward(self, inputs):
        return self.model(**inputs, past_key_values=self.cache).logits

    def reorder(self, sources):
        self.cache.reorder_cache(torch.tensor(sources))

    def num_tokens(self):
        return self.cache._rows.num_tokens()

    def restart(self):
        self.cache.reset()

    def settle(self):
        self.cache.settle()


class PatchedRows:
    """A tiny llama with the `forward` that patching gives Unsloth's models of slow families."""

    def __init__(self, format="exact", **options):
        self.model, self.past = tiny_model(), None
        geometry = ModelGeometry.from_config(self.model.config)
        options = {"kv_cache_bytes": 16 << 20, "max_num_seqs": 16, "debug_poison": True} | options
        cache = model_cache(
            LoadedModel("llama", self.model, None, geometry),
            _format(format),
            CacheOptions(enable_prefix_caching=False, **options),
            gpu_memory_utilization=0.8,
        )
        level = logging.DEBUG
        self.patched = PatchedForward(
            self.model, cache, is_fast=False, graphs=None, report_level=level
        )
        self.model.forward = self.patched
        self.model._reorder_cache = SpectralPast.reorder_cache

    @property
    def kv_cache(self):
        return self.patched.cache

    def generate(self, inputs, **options):
        self.restart()
        return generated(self.model, inputs, **options)

    @torch.no_grad()
    def forward(self, inputs):
        done = self.model(**inputs, past_key_values=self.past, use_cache=True)
        self.past = done.past_key_values
        return done.logits

    def reorder(self, sources):
        self.past = self.past.reorder_cache(torch.tensor(sources))

    def num_tokens(self):
        return self.past.rows.num_tokens()

    def restart(self):
        self.past = None

    def settle(self):
        self.patched.batches.settle()


INTEGRATIONS = {"transformers": TransformersRows, "patched": PatchedRows}


def _format(name):
    return tiny_format(name) if isinstance(name, str) else name
