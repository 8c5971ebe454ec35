"""One-token steps of an Unsloth model as CUDA graphs.

Unsloth's own step launches hundreds of small kernels from Python for each token. Here its functions
run once for each batch size while a graph is captured, and the graph is replayed after that. They
run in Unsloth's own mode for graphs, which reads no lengths back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_paged.cache import SpectralKVCache
from spectral_paged.integrations.unsloth.attention import (
    ServedStep,
    decode_attention,
    served_step,
    serving,
)
from spectral_paged.integrations.unsloth.families import unsloth_module
from spectral_paged.models.decode_graphs import DecodeGraphs
from spectral_paged.sampling import PendingTokens

# families with `_LlamaModel_fast_forward_inference`; the steps of others read lengths back
GRAPHED = ("llama", "mistral", "qwen2", "qwen3")


def fingerprint(model: Any, num_positions: int) -> Any:
    """The state of a model that a captured step depends on; None if Unsloth cannot capture it.

    It has the addresses of weights, adapters and rotary tables, and the number of their changes by
    an optimizer.
    """
    layers = model.model.layers
    layers[0].self_attn.rotary_emb.extend_rope_embedding(model.lm_head.weight, num_positions + 1)
    return unsloth_module("_decode_graphs")._fingerprint(model, layers, num_positions)


class UnslothGraphs:
    """CUDA graphs of the one-token steps of a patched model.

    Args:
        model: a causal LM of a family in `GRAPHED`, on CUDA.
        cache: the cache over which the model attends.
    """

    def __init__(self, model: Any, cache: SpectralKVCache) -> None:
        self.model, self.cache = model, cache
        self._forward = unsloth_module("llama")._LlamaModel_fast_forward_inference(_attention)
        nothing = torch.empty((1, 1, 1, 1), dtype=cache.dtype, device=cache.device)
        self._past = [(nothing, nothing)] * cache.num_layers
        self._fingerprint: Any = None
        self._graphs: DecodeGraphs | None = None

    @property
    def num_graphs(self) -> int:
        return 0 if self._graphs is None else self._graphs.num_graphs

    def refresh(self) -> None:
        """Drop graphs if weights or adapters have changed since they were captured.

        Called at each prompt, because adapters do not change while a batch is generated.
        """
        found = fingerprint(self.model, self.cache.max_model_len)
        if found is None:
            self.drop()
        elif self._graphs is None or found != self._fingerprint:
            self._graphs = DecodeGraphs(self.cache, self._logits)
        self._fingerprint = found

    def drop(self) -> None:
        """Drop all graphs, and with them their reference to the cache."""
        self._graphs = None

    @property
    def is_ready(self) -> bool:
        """True if the last `refresh` found that steps can be captured."""
        return self._graphs is not None

    def run(self, input_ids: Tensor, positions: Sequence[int]) -> Tensor:
        """Logits fp32 `[B, 1, vocab]` of the cache's open step, for input ids `[B, 1]`.

        `positions` are those of the input tokens.
        """
        assert self._graphs is not None
        count, before = len(positions), self._graphs.num_graphs
        with torch.inference_mode():
            tokens = PendingTokens(input_ids.reshape(-1), range(count))
            logits = self._graphs.run([0] * count, positions, tokens)
        if self._graphs.num_graphs != before:  # the first run casts adapters, and keeps the casts
            self._fingerprint = fingerprint(self.model, self.cache.max_model_len)
        return logits.clone().unsqueeze(1)  # the next replay overwrites them

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits `[n, vocab]` of int64 `[n]` ids and positions."""
        graphs, device = unsloth_module("_decode_graphs"), self.cache.device
        autocast = torch.autocast(
            device.type,
            dtype=self.cache.dtype,
            enabled=self.cache.dtype in (torch.float16, torch.bfloat16),
            cache_enabled=False,  # cached casts would lie in the graph's memory
        )
        graphs._TLS.statics = graphs._StepStatics(self.cache.max_model_len, None)
        try:
            with serving(ServedStep(self.cache)), autocast:
                output = self._forward(
                    self.model, ids.unsqueeze(1), self._past, positions.unsqueeze(1)
                )
                logits: Tensor = unsloth_module("llama")._decode_logits(self.model, output[0])
        finally:
            graphs._TLS.statics = None
        return logits[:, 0]


def _attention(attention: Any, *, past_key_value: Any, **arguments: Any) -> tuple[Tensor, Any]:
    """The attention that Unsloth's step calls in each layer, inside `serving`."""
    step = served_step()
    assert isinstance(step, ServedStep)
    return decode_attention(step, attention, **arguments), past_key_value
