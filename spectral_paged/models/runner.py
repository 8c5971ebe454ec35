"""The runner runs a transformers model over a flattened batch, with attention in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from spectral_paged.cache import SpectralKVCache, StepPlan
from spectral_paged.device import upload
from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.attention_choice import (
    FlatAttention,
    attend_heads,
    register_attention,
)
from spectral_paged.models.decode_graphs import (
    DecodeGraphs,
    graph_capacities,
    known_tokens,
)
from spectral_paged.models.lora import TokenAdapters
from spectral_paged.models.parked_weights import ParkedWeights
from spectral_paged.models.stored_tensors import stored_bytes
from spectral_paged.models.weight_quantization import quantization_of
from spectral_paged.pool.weak_method import WeakMethod
from spectral_paged.sampling import LogitsVisitor, PendingTokens

SLICE_BYTES = 32 << 20  # of fp32 logits that a visitor is shown at once


def spectral_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spectral_cache: FlatAttention,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend through the cache, as an attention function of transformers.

    q `[1, Hq, T, D]`, k and v `[1, Hkv, T, D]` after RoPE, KV heads not repeated; `s_aux` `[Hq]`
    are the layer's sinks. The batch is one flattened row, and the cache's plan separates its
    sequences, so no mask is made.
    """
    return attend_heads(spectral_cache, module.layer_idx, query, key, value, s_aux), None


# All models of a process, compiled or not, look the function up by this name. Compiled layers need
# a graph break, because attention depends on the step, not on the layer's code.
PAGED_ATTENTION = register_attention("spectral_paged", torch.compiler.disable(spectral_attention))


def compiled_parts(model: Any) -> list[Any]:
    """Return the modules to compile separately (decision 0021), because layers share their code."""
    return [*model.model.layers, model.model.norm]


def uncompile(model: Any) -> None:
    """Undo the compilation of a model by a `ModelRunner`."""
    for part in compiled_parts(model):
        part._compiled_call_impl = None


@contextmanager
def head_alone(model: Any, hidden: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function from rows of `hidden`, `[1, T, d]`, to the model's logits `[rows, vocab]`.

    The model's own forward makes them, with its scale and soft cap, over a base model that returns
    `hidden` without running.
    """
    base = model.model
    before = vars(base).get("forward")
    base.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield lambda rows: model(input_ids=None, logits_to_keep=rows).logits[0]
    finally:
        del base.forward
        if before is not None:
            base.forward = before


class _AttentionLease:
    """The attention that a model had before its runners replaced it, and their number."""

    models: WeakKeyDictionary[Any, _AttentionLease] = WeakKeyDictionary()

    def __init__(self, attention: str) -> None:
        self.attention = attention
        self.runners = 0

    @classmethod
    def take(cls, model: Any) -> None:
        own = cls.models.get(model) or cls(model.config._attn_implementation)
        own.runners += 1
        cls.models[model] = own  # garbage collection may have given back the last one meanwhile

    @classmethod
    def check_alone(cls, model: Any) -> None:
        """Raise where several runners use a model."""
        if (number := cls.models[model].runners) > 1:
            raise InvalidRequestError(
                f"{number} LLMs run this model, which sleeps for all of them: close the others"
            )

    @classmethod
    def give_back(cls, reference: ref[Any]) -> None:
        """Count one runner less; after the last one restore the model's attention and layers."""
        model = reference()
        if model is None:
            return
        own = cls.models[model]
        own.runners -= 1
        if not own.runners:
            del cls.models[model]
            uncompile(model)
            model.set_attn_implementation(own.attention)


class ModelRunner:
    """Runs a causal LM whose attention goes through a `SpectralKVCache`.

    ```
                     CUDA                             CPU
    decode step      a CUDA graph                     eager
    other steps      eager, layers compiled           eager
    ```

    Args:
        enforce_eager: no CUDA graphs and no `torch.compile`.
        compile_layers: `torch.compile` the decoder layers around attention, with dynamic lengths.
        adapters: what the model's layers read of tokens' LoRA adapters, where they have places.
        max_decode_rows: most tokens that attend one by one in a step; None: one of each sequence.
    """

    def __init__(
        self,
        model: Any,
        cache: SpectralKVCache,
        *,
        enforce_eager: bool = False,
        compile_layers: bool = True,
        adapters: TokenAdapters | None = None,
        max_decode_rows: int | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.device
        fast = self.device.type == "cuda" and not enforce_eager
        self._adapters = adapters
        decode = WeakMethod(self._decode_logits)
        self.graphs = DecodeGraphs(cache, decode, adapters, max_decode_rows) if fast else None
        self.compiles = fast and compile_layers
        self._parked: ParkedWeights | None = None  # while the model sleeps
        self._weights: dict[str, object] = {
            "quantization": quantization_of(model),
            "weight_bytes": stored_bytes(model),
        }
        _AttentionLease.take(model)
        self._give_back = finalize(self, _AttentionLease.give_back, ref(model))
        self._give_back.atexit = False
        if self.compiles:
            for part in compiled_parts(model):
                part.compile(dynamic=True)
        model.set_attn_implementation(PAGED_ATTENTION)

    def sleep(self) -> None:
        """Drop the graphs, and move the weights to host memory, where they are in no other.

        Raises:
            InvalidRequestError: another runner uses the same weights.
        """
        _AttentionLease.check_alone(self.model)
        if self.graphs is not None:
            self.graphs.drop()
        if self.device.type != "cpu":
            self._parked = ParkedWeights(self.model)

    def wake_up(self) -> None:
        """Bring the weights back. Graphs are captured again when steps need them."""
        if self._parked is not None:
            self._parked.restore()
            self._parked = None

    def close(self) -> None:
        """Drop the graphs; if no other runner is left, the model attends as it did before."""
        self.wake_up()
        self.graphs = None
        self._give_back()

    def stats(self) -> dict[str, object]:
        """Return the kind of the model's step and of its weights, and figures of graphs."""
        how, graphs = "compiled" if self.compiles else "eager", self.graphs
        return self._weights | {
            "model_step": how if graphs is None else f"{how} + cuda graphs",
            "num_graphs": 0 if graphs is None else graphs.num_graphs,
            "graph_replays": 0 if graphs is None else graphs.num_replays,
        }

    @torch.inference_mode()
    def warm_up(self, num_seqs: int, num_tokens: int) -> int:
        """Compile the kernels that seal and rebuild, capture graphs, and return their number.

        Graphs are captured for every batch size up to `num_seqs` and any number of pages that
        sequences of up to `num_tokens` tokens have. Other graphs, and before an online calibration
        those with pages, are captured when a step needs them.
        """
        self.cache.warm_up()
        if self.graphs is None:
            return 0
        format = self.cache.format
        waiting = format.needs_calibration and not format.basis_id
        blocks = 0 if waiting else self.cache.visibility.visible_blocks(num_tokens, 0)
        for size in self.graphs.sizes:
            for entries in graph_capacities(min(size, num_seqs) * blocks):
                self.graphs.prepare(size, entries)
                if self._adapters is not None:
                    self.graphs.prepare(size, entries, adapted=True)
            if size >= num_seqs:
                break
        if blocks and num_seqs > 1:
            self.graphs.prepare_tiles()
        return self.graphs.num_graphs

    @torch.inference_mode()
    def forward(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        logit_rows: Sequence[int],
        pending: PendingTokens | None = None,
        visitor: LogitsVisitor | None = None,
        adapters: Sequence[int] | None = None,
    ) -> Tensor:
        """Run a step between `begin_step` and `end_step` and return its logits.

        fp32 `[len(logit_rows), vocab]`; the next step overwrites them.

        Args:
            token_ids: the step's tokens, flattened in plan order.
            logit_rows: indices into the flat batch whose logits are returned.
            pending: tokens that are on the device only; `token_ids` has any value in their place.
            visitor: is shown the logits of more rows, however many, a slice at a time.
            adapters: the index of each sequence's LoRA adapter, 0 for none, in plan order; None: no
                sequence has one.
        """
        whole = len(logit_rows) == len(token_ids)
        if self.graphs is not None and plan.is_decode and visitor is None:
            if adapters is not None and plan.num_tokens != len(adapters):
                adapters = np.repeat(adapters, plan.counts).tolist()
            logits = self.graphs.run(token_ids, plan.positions, pending, adapters)
            return logits if whole else logits[upload(logit_rows, torch.long, self.device)]
        flat = np.stack((np.asarray(token_ids, np.int64), plan.positions))
        ids, where = upload(flat, torch.long, self.device)
        if pending is not None:
            sources = upload(pending.sources, torch.long, self.device)
            ids = known_tokens(ids, sources, pending.ids)
        rows = None if whole else upload(logit_rows, torch.long, self.device)
        with nullcontext() if adapters is None else self._adapted(plan, adapters):
            if visitor is not None:
                return self._visited(ids, where, logit_rows, visitor)
            return self._logits(ids, where, rows).float()

    def _adapted(self, plan: StepPlan, adapters: Sequence[int]) -> AbstractContextManager[None]:
        """Give the tokens of a step their sequences' adapters inside a `with` block."""
        assert self._adapters is not None, "the model has places for adapters"
        of_tokens = np.repeat(np.asarray(adapters, np.int32), plan.counts)
        return self._adapters.of(upload(of_tokens, torch.int32, self.device))

    def _visited(
        self, ids: Tensor, positions: Tensor, logit_rows: Sequence[int], visitor: LogitsVisitor
    ) -> Tensor:
        """Return the logits of `logit_rows`, after those of the visitor's rows were shown to it."""
        base = self.model.model
        hidden = base(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            spectral_cache=self.cache,
        ).last_hidden_state
        most = max(1, SLICE_BYTES // (4 * self.model.config.vocab_size))
        with head_alone(self.model, hidden) as head:
            for start in range(0, len(visitor.rows), most):
                rows = visitor.rows[start : start + most]
                visitor.visit(head(upload(rows, torch.long, self.device)).float())
            return head(upload(logit_rows, torch.long, self.device)).float()

    def _decode_logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._logits(ids, positions, None)

    def _logits(self, ids: Tensor, positions: Tensor, rows: Tensor | None) -> Tensor:
        output = self.model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            logits_to_keep=0 if rows is None else rows,
            spectral_cache=self.cache,
        )
        logits: Tensor = output.logits[0]
        return logits
