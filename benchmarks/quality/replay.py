"""Dense replay: a model over contexts whose blocks are sealed by any method.

A `Context` is a prefilled text, with keys and values in the model's dtype, as a cache would store
them. Sealing replaces the full blocks between the landmarks and the hot tokens by the K and V that
a method stores. The model then continues one context in any number of ways (see
`shared_attention`), and every method goes through the same attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectral_paged.benchmarks.quality.methods import (
    Calibrated,
    ManyLayers,
    Method,
    Sample,
    WantsQueries,
)
from spectral_paged.benchmarks.quality.shared_attention import Pass, take_over
from spectral_paged.errors import InvalidRequestError, PromptTooLongError, UnsupportedModelError
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.models.geometry import rotary_table
from spectral_paged.models.loader import LoadedModel
from spectral_paged.rope import RotaryTable

CHUNK_TOKENS = 2048
LAYER_BLOCKS = 64  # most blocks that a method of many layers gets in one call
PROJECTED_ROWS = 256  # rows of logits in memory at once where only log-probabilities are returned


@dataclass(frozen=True, slots=True)
class Context:
    """Keys after RoPE and values of a text, `[layers, H, tokens, D]`, in the model's dtype.

    The first `num_sealed` blocks past the landmarks are as `method` (its name) stores them. `q` are
    the queries after RoPE, `[layers, Hq, tokens, D]`, if they were kept.
    """

    k: Tensor
    v: Tensor
    q: Tensor | None = None
    num_sealed: int = 0
    method: str = ""

    @property
    def num_tokens(self) -> int:
        return self.k.shape[2]


@dataclass(frozen=True, slots=True)
class Blocks:
    """N whole blocks of one layer, fp32, the input of `Method.rebuild`.

    `k` (before RoPE) and `v` `[N, H, 512, D]`, `cos` and `sin` `[N, 1, 512, rotary_dim / 2]`,
    `q` (after RoPE) `[N, H, G, 512, D]` or None.
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    q: Tensor | None

    def stored_by(self, method: Method, layer: int) -> tuple[Tensor, Tensor]:
        """The blocks as `method` stores them: keys after RoPE, and values."""
        if not isinstance(method, WantsQueries):
            return method.rebuild(layer, self.k, self.v, self.cos, self.sin)
        if self.q is None:
            raise InvalidRequestError(
                f"{method.name} weighs by queries: prefill with keep_queries=True"
            )
        queries = self.q[..., -method.num_queries :, :]
        return method.rebuild_with(layer, self.k, self.v, self.cos, self.sin, queries)


def _stored(method: Method, layers: Sequence[int], blocks: list[Blocks]) -> tuple[Tensor, Tensor]:
    """The blocks of `layers` as `method` stores them, in the order of the layers."""
    if len(layers) == 1 or not isinstance(method, ManyLayers):
        (alone,) = blocks
        return alone.stored_by(method, layers[0])
    each = [layer for layer, some in zip(layers, blocks, strict=True) for _ in some.k]
    k, v, cos, sin = (
        torch.cat([getattr(some, name) for some in blocks]) for name in ("k", "v", "cos", "sin")
    )
    return method.rebuild_layers(each, k, v, cos, sin)


class Replay:
    """A causal LM that prefills, seals and continues contexts, with its attention replaced.

    Raises:
        UnsupportedModelError: its attention has windows, soft caps or sinks.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.model = loaded.model
        self.geometry = geometry = loaded.geometry
        parts = {
            "windows": any(geometry.windows),
            "soft caps": geometry.softcap is not None,
            "sinks": geometry.has_sinks,
        }
        if found := [name for name, there in parts.items() if there]:
            raise UnsupportedModelError(
                f"attention of {self.model.config.model_type} has {' and '.join(found)}, which a "
                "replay of contexts leaves out: take a llama, mistral, qwen2 or qwen3 model "
                "without them"
            )
        self._rope: RotaryTable | None = None

    @property
    def softmax_scale(self) -> float:
        return float(self.model.model.layers[0].self_attn.scaling)

    # ---- contexts ------------------------------------------------------------------------

    def prefill(self, ids: Sequence[int], *, keep_queries: bool = False) -> Context:
        """The exact context of `ids`."""
        context = self._empty(len(ids), keep_queries)
        self._fill(context, ids, 0, len(ids))
        return context

    def prefill_through(self, ids: Sequence[int], method: Method, segment: int) -> Context:
        """A context whose later tokens were computed over sealed blocks, as in the engine.

        Segments of `segment` tokens count from the landmarks. Block b is sealed before a segment
        that starts at s if `s >= landmarks + 512 (b + 1) + hot`. At the end, the blocks are sealed
        that the first generated token may see as pages.

        Raises:
            InvalidRequestError: `segment` is no multiple of 512.
        """
        if segment < BLOCK_TOKENS or segment % BLOCK_TOKENS:
            raise InvalidRequestError(f"segment is {segment}; it must be a multiple of 512")
        context, start = self._empty(len(ids), isinstance(method, WantsQueries)), 0
        end = method.num_landmark_tokens + segment
        while start < len(ids):
            context = self._seal_until(context, method, start)
            self._fill(context, ids, start, min(end, len(ids)))
            start, end = end, end + segment
        return self._seal_until(context, method, len(ids))

    def seal(self, context: Context, method: Method) -> Context:
        """A new context with all blocks between landmarks and hot tokens sealed by `method`.

        Raises:
            InvalidRequestError: blocks of `context` are sealed already.
        """
        if context.num_sealed:
            raise InvalidRequestError(
                f"the context's blocks are sealed by {context.method}; seal the exact context"
            )
        copy = replace(context, k=context.k.clone(), v=context.v.clone())
        return self._seal_until(copy, method, context.num_tokens)

    def calibrate(self, methods: Iterable[Method], ids: Sequence[int]) -> None:
        """Calibrate every method that needs it on the keys, values and queries of a text."""
        waiting = [m for m in methods if isinstance(m, Calibrated)]
        if waiting:
            context = self.prefill(ids, keep_queries=True)
            assert context.q is not None
            rope = rotary_table(self.model, len(ids), self.model.device)
            cos, sin = rope.cos[: len(ids)], rope.sin[: len(ids)]
            q = context.q.unflatten(1, (self.geometry.num_kv_heads, -1)).float()
            k, v = context.k.float(), context.v.float()
            sample = Sample(rotate(k, cos, sin, inverse=True), v, q, cos, sin)
            for method in waiting:
                method.calibrate(sample)

    def _empty(self, num_tokens: int, keep_queries: bool) -> Context:
        limit = self.geometry.max_position_embeddings
        if not num_tokens:
            raise InvalidRequestError("a context needs at least one token")
        if num_tokens > limit:
            raise PromptTooLongError(
                f"the context has {num_tokens} tokens, the model serves {limit}: shorten it"
            )
        g = self.geometry

        def empty(heads: int) -> Tensor:
            shape = (g.num_layers, heads, num_tokens, g.head_dim)
            return torch.empty(shape, dtype=self.model.dtype, device=self.model.device)

        q = empty(g.num_q_heads) if keep_queries else None
        return Context(empty(g.num_kv_heads), empty(g.num_kv_heads), q)

    def _fill(self, context: Context, ids: Sequence[int], start: int, end: int) -> None:
        """Compute tokens [start, end) of `context`, in chunks, over the tokens before them."""
        for begin in range(start, end, CHUNK_TOKENS):
            stop = min(begin + CHUNK_TOKENS, end)
            own_k, own_v = (x[:, None, :, begin:stop] for x in (context.k, context.v))
            tokens = torch.tensor([list(ids[begin:stop])], device=self.model.device)
            own_q = None if context.q is None else context.q[:, None, :, begin:stop]
            step = Pass(context.k, context.v, begin, own_k, own_v, own_q=own_q)
            self._run(tokens, begin, step)

    def blocks(self, context: Context, layer: int, start: int, end: int) -> Blocks:
        """Tokens [start, end) of one layer, which are whole blocks, as the input of methods."""
        if self._rope is None or self._rope.max_positions < end:
            self._rope = rotary_table(self.model, end, self.model.device)
        rows = (self._rope.cos[start:end], self._rope.sin[start:end])
        cos, sin = (x.unflatten(0, (-1, 1, BLOCK_TOKENS)) for x in rows)
        k, v = (
            x[layer, :, start:end].unflatten(1, (-1, BLOCK_TOKENS)).transpose(0, 1)
            for x in (context.k, context.v)
        )
        k, v = k.float().contiguous(), v.float().contiguous()
        q = None
        if context.q is not None:
            heads = context.q[layer, :, start:end].unflatten(0, (k.shape[1], -1))
            q = heads.unflatten(2, (-1, BLOCK_TOKENS)).permute(2, 0, 1, 3, 4).float()
        return Blocks(rotate(k, cos, sin, inverse=True), v, cos, sin, q)

    @torch.inference_mode()
    def _seal_until(self, context: Context, method: Method, position: int) -> Context:
        """Seal, in place, the blocks that a query at `position` may see as pages."""
        marks, first = method.num_landmark_tokens, context.num_sealed
        last = (position - marks - method.hot_tokens) // BLOCK_TOKENS
        if last <= first:
            return context
        start, end = marks + first * BLOCK_TOKENS, marks + last * BLOCK_TOKENS
        at_once = max(1, LAYER_BLOCKS // (last - first)) if isinstance(method, ManyLayers) else 1
        layers = range(self.geometry.num_layers)
        for some in (layers[i : i + at_once] for i in range(0, len(layers), at_once)):
            blocks = [self.blocks(context, layer, start, end) for layer in some]
            rebuilt = _stored(method, some, blocks)
            for side, new in zip((context.k, context.v), rebuilt, strict=True):
                by_layer = new.unflatten(0, (len(some), -1)).transpose(1, 2).flatten(2, 3)
                side[some.start : some.stop, :, start:end] = by_layer
        return replace(context, num_sealed=last, method=method.name)

    # ---- continuations -------------------------------------------------------------------

    def hidden(self, context: Context, ids: Tensor) -> Tensor:
        """Last hidden states `[B, n, width]` of continuations `ids` `[B, n]` of one context."""
        ids = ids.to(self.model.device)
        return self._run(ids, context.num_tokens, Pass(context.k, context.v, context.num_tokens))

    @torch.inference_mode()
    def project(self, hidden: Tensor) -> Tensor:
        """Logits fp32 `[..., vocab]` of hidden states, summed and kept in fp32.

        A model in bf16 rounds its logits to 8 bits, which would drown small divergences.
        """
        weight = self.model.get_output_embeddings().weight
        rows = hidden.reshape(-1, hidden.shape[-1])
        if rows.is_cuda and rows.dtype != torch.float32:
            logits = torch.mm(rows, weight.T, out_dtype=torch.float32)
        else:
            logits = rows.float() @ weight.float().T
        scaling = getattr(self.model.config, "logits_scaling", 1.0)  # granite's
        return logits.view(*hidden.shape[:-1], -1) / scaling

    def logits(self, context: Context, ids: Tensor, *, logits_from: int = 0) -> Tensor:
        """Teacher-forced logits, fp32 `[B, n - logits_from, vocab]`.

        Row i predicts `ids[:, i + 1]`; `ids` `[B, n]` are independent continuations. The result may
        be large: `token_log_probs`, or `hidden` and `project` by rows, need less memory.
        """
        return self.project(self.hidden(context, ids)[:, logits_from:])

    def token_log_probs(self, context: Context, ids: Tensor, *, logits_from: int = 0) -> Tensor:
        """Log-probabilities of `ids[:, i + 1]` for i from `logits_from` on.

        fp32 `[B, n - 1 - logits_from]`."""
        rows = self.hidden(context, ids)[:, logits_from:-1].flatten(0, 1)
        targets = ids[:, logits_from + 1 :].to(rows.device)
        chosen = [
            -torch.nn.functional.cross_entropy(self.project(some), wanted, reduction="none")
            for some, wanted in zip(
                rows.split(PROJECTED_ROWS), targets.flatten().split(PROJECTED_ROWS), strict=True
            )
        ]
        return torch.cat(chosen).view(targets.shape)

    @torch.inference_mode()
    def generate(
        self,
        context: Context,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        eos: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Greedy continuations of ragged `prompts` over one context, decoded as a batch.

        Each has at most `max_tokens` tokens and ends with the first `eos` token, if there is one.

        Raises:
            InvalidRequestError: a prompt is empty, or `max_tokens` is below 1.
        """
        if not all(prompts) or max_tokens < 1:
            raise InvalidRequestError("prompts must not be empty, max_tokens at least 1")
        if not prompts:
            return []
        device, g = self.model.device, self.geometry
        stops = {eos} if isinstance(eos, int) else set(eos or ())
        longest = max(map(len, prompts))
        padded = torch.tensor([[*p, *[p[-1]] * (longest - len(p))] for p in prompts], device=device)
        slots = torch.tensor([len(p) for p in prompts], device=device)
        shape = (g.num_layers, len(prompts), g.num_kv_heads, longest + max_tokens, g.head_dim)
        own_k, own_v = (torch.zeros(shape, dtype=context.k.dtype, device=device) for _ in range(2))
        past = context.num_tokens
        step = Pass(context.k, context.v, past, own_k, own_v)
        hidden = self._run(padded, past, step)
        tokens = self.project(hidden[torch.arange(len(prompts)), slots - 1]).argmax(-1)
        outputs = [[t] for t in tokens.tolist()]
        step.used = longest
        while len(outputs[0]) < max_tokens and not all(stops & set(o) for o in outputs):
            step.slots, step.used = slots, step.used + 1
            hidden = self._run(tokens[:, None], (past + slots)[:, None], step)
            tokens = self.project(hidden[:, 0]).argmax(-1)
            for output, token in zip(outputs, tokens.tolist(), strict=True):
                output.append(token)
            slots = slots + 1
        ends = [next((i + 1 for i, t in enumerate(o) if t in stops), len(o)) for o in outputs]
        return [output[:end] for output, end in zip(outputs, ends, strict=True)]

    @torch.inference_mode()
    def _run(self, ids: Tensor, positions: int | Tensor, replay_pass: Pass) -> Tensor:
        """Last hidden states of `ids` `[B, n]` at `positions`, `[B, n]` or that of the first."""
        take_over(self.model)
        if isinstance(positions, int):
            positions = torch.arange(positions, positions + ids.shape[1], device=ids.device)[None]
        return self.model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
            replay_pass=replay_pass,
        ).last_hidden_state
