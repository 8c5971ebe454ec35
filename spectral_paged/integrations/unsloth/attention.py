"""Attention of Unsloth's forward passes, redirected to a paged cache while a step is served.

Unsloth attends in two ways. Prompts pass `XAttention.forward`, which projects, rotates and calls
one of a few kernels by their module-global names. One-token steps pass a function of their own that
does all of it. The kernels and those functions are replaced by functions that attend over the cache
if this thread serves a step, and call the original otherwise.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from spectral_paged.cache import SpectralKVCache
from spectral_paged.integrations.patching import Patch, replace_everywhere
from spectral_paged.integrations.row_batch import without_autocast
from spectral_paged.integrations.unsloth.families import (
    KERNELS,
    fast_functions,
    fast_modules,
    unsloth_module,
)
from spectral_paged.models.attention_choice import attend_heads

Function = Callable[..., Any]


class PromptStep(ABC):
    """The attention of the layers of a prompt, in place of Unsloth's kernels.

    Attributes:
        past: stands for the K and V that Unsloth's attention returns.
        layer: index of the layer whose attention runs now.
    """

    past: Any = None
    layer = -1

    @abstractmethod
    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q `[1, Hq, T, D]`, k and v `[1, Hkv, T, D]`; returns `[1, T, Hq, D]`."""


class ServedStep(PromptStep):
    """Attention over a cache in its open step.

    Attributes:
        order: int64 `[T]`, the place in the cache's plan of each token of the model's batch; None
            where both have the same order.
    """

    def __init__(self, cache: SpectralKVCache, *, order: Tensor | None = None) -> None:
        self.cache = cache
        self.order = order
        self.places = None if order is None else torch.argsort(order)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Attend with q `[T, Hq, D]`, k and v `[T, Hkv, D]` after RoPE; returns `[T, Hq, D]`.

        All of them are in the order of the model's batch.
        """
        if self.places is not None:
            q, k, v = (x.index_select(0, self.places) for x in (q, k, v))
        with without_autocast(self.cache.device):
            out = self.cache.attend(layer, q, k, v, sinks)
        return out if self.order is None else out.index_select(0, self.order)

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_heads(self, self.layer, q, k, v)


class _Serving(threading.local):
    step: PromptStep | None = None


_serving = _Serving()


@contextmanager
def serving(step: PromptStep) -> Iterator[None]:
    """Let `step` attend in models that this thread calls inside the `with` block."""
    _serving.step, before = step, _serving.step
    try:
        yield
    finally:
        _serving.step = before


def served_step() -> PromptStep | None:
    """The step that this thread serves; compiled (training) code never serves one."""
    return None if torch.compiler.is_compiling() else _serving.step


@contextmanager
def prompt_layers(attentions: list[Any], step: PromptStep) -> Iterator[None]:
    """Set `step.layer` while a layer attends, and let attention return `step.past` as K and V."""

    def enter(module: Any, _: Any) -> None:
        step.layer = module.layer_idx

    def leave(module: Any, _: Any, output: Any) -> Any:
        return (*output[:2], step.past)

    handles = [a.register_forward_pre_hook(enter) for a in attentions]
    handles += [a.register_forward_hook(leave) for a in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_prompt(
    model: Any,
    forward: Function,
    step: PromptStep,
    ids: Tensor,
    positions: Tensor,
    *,
    lengths: list[int],
    keep: int,
) -> Tensor:
    """Logits `[keep, vocab]` of a model whose family has Unsloth's attention; `step` attends.

    Args:
        forward: the causal LM's own.
        ids, positions: int64 `[T]`, rows end to end.
        lengths: tokens of each row.
        keep: last tokens whose logits are returned.
    """
    nothing = torch.empty((), dtype=model.dtype, device=ids.device)
    step.past = (nothing, nothing)
    gemma2 = model.config.model_type == "gemma2"
    with serving(step), prompt_layers([layer.self_attn for layer in model.model.layers], step):
        # Without lengths Unsloth cuts the batch at max_seq_length. With a mask of None it makes one
        # of [T, T] (mistral) or [max_seq_length, max_seq_length] (gemma2), so others are passed.
        output = forward(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            causal_mask=False,
            attention_mask=ids.new_ones((1, 1, 1, 1)) if gemma2 else None,
            packed_seq_lengths=torch.tensor(lengths, dtype=torch.int32),
            use_cache=True,
            logits_to_keep=keep,
            return_dict=True,
        )
    logits: Tensor = output.logits[0]
    return logits


# ---- replacements ----------------------------------------------------------------------------


def _run_attention(original: Function) -> Function:
    @functools.wraps(original)
    def run_attention(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        step = served_step()
        if step is None:
            return original(config=config, context=context, Q=Q, K=K, V=V)
        return step.attend_heads(Q, K, V)

    return run_attention


def _softcapped(original: Function) -> Function:
    @functools.wraps(original)
    def slow_attention(Q: Tensor, K: Tensor, V: Tensor, *rest: Any, **named: Any) -> Tensor:
        step = served_step()
        if step is None:
            return original(Q, K, V, *rest, **named)
        return step.attend_heads(Q, K, V).flatten(2)

    return slow_attention


def _one_token(original: Function) -> Function:
    @functools.wraps(original)
    def attention(self: Any, hidden_states: Tensor, past_key_value: Any, *rest: Any, **named: Any):  # type: ignore[no-untyped-def]
        step = served_step()
        if not isinstance(step, ServedStep):
            return original(self, hidden_states, past_key_value, *rest, **named)
        return decode_attention(step, self, hidden_states, *rest, **named), past_key_value

    return attention


def decode_attention(
    step: ServedStep,
    attention: Any,
    hidden_states: Tensor,
    position_ids: Tensor,
    *,
    rotary_seq_len: int | None = None,
    **_: Any,
) -> Tensor:
    """One layer of a one-token step: project, norm, rotate, attend, project; `[B, 1, hidden]`.

    Arguments are those of Unsloth's functions. Masks are ignored, because the cache knows them.
    """
    llama = unsloth_module("llama")
    rows, width = hidden_states.shape[0], attention.head_dim
    q, k, v = (
        llama.fast_linear_forward(projection, hidden_states).view(rows, 1, -1, width)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    length = rotary_seq_len or int(position_ids.max()) + 1
    attention.rotary_emb.extend_rope_embedding(v, length + 1)
    cos, sin = attention.rotary_emb.get_cached(length, q.device.index)
    q, k = _normed_and_turned(attention, q, k, cos, sin, position_ids)
    out = step.attend(attention.layer_idx, q.squeeze(2), k.squeeze(2), v.squeeze(1))
    return llama.fast_linear_forward(attention.o_proj, out.reshape(rows, 1, -1))


def _normed_and_turned(
    attention: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Norm and turn q and k `[B, 1, H, D]`, in one launch where Unsloth has it; `[B, H, 1, D]`."""
    llama = unsloth_module("llama")
    if hasattr(attention, "q_norm"):
        norms = attention.q_norm, attention.k_norm
        fused = unsloth_module("qwen3").decode_qk_norm_rope(*norms, q, k, cos, sin, position_ids)
        if fused is not None:
            q, k = fused
            return q, k
        q, k = (
            llama.fast_rms_layernorm_inference(norm, x)
            for norm, x in zip(norms, (q, k), strict=True)
        )
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if llama.decode_rope_inplace(q, k, cos, sin, position_ids):
        return q, k
    cos, sin = (x[position_ids].unsqueeze(1).to(q) for x in (cos, sin))
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` `[B, H, 1, D]` by RoPE in half-split pairs; cos and sin are `[B, 1, 1, D]`."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class FunctionPatches:
    """The replacements of Unsloth's functions, in force while at least one model needs them.

    Garbage collection may run at any line here and find that a model is gone, so a model counts
    before its functions are replaced, and a removal may be asked for while another one runs.
    """

    def __init__(self) -> None:
        self._replacements: dict[str, tuple[Function, Function]] = {}
        self._patches: list[Patch] = []
        self._models: WeakSet[Any] = WeakSet()
        self._removes = False

    def install(self, model: Any) -> None:
        """Replace all present references, also those that an earlier call replaced, until `model`
        is released or gone.

        If that fails, the replacements of earlier calls stay, because other models may need them.
        """
        before = list(self._patches)
        self._models.add(model)
        try:
            self._remove()
            self._replace()
        except BaseException:
            self._go_back(before)
            self.release(model)
            raise

    def release(self, model: Any) -> None:
        """Put every original back unless a model other than `model` needs the replacements."""
        self._models.discard(model)
        self.remove_unused()

    def remove_unused(self) -> None:
        """Put every original back unless a model needs the replacements."""
        if not list(self._models):  # its length counts models that are just being collected
            self._remove()

    def _replace(self) -> None:
        for name, original in fast_functions().items():
            # the same replacement each time: a class set up while it was in force keeps it
            if name not in self._replacements:
                make = {"run_attention": _run_attention}.get(
                    name, _softcapped if name in KERNELS else _one_token
                )
                self._replacements[name] = original, make(original)
            old, new = self._replacements[name]
            self._patches.append(replace_everywhere(old, new, modules=fast_modules()))

    def _go_back(self, before: list[Patch]) -> None:
        """Undo patches that are not in `before`, and repeat those of `before` that were undone."""
        for patch in reversed(self._patches):
            if patch not in before:
                patch.undo()
        self._patches = [p if p in self._patches else Patch(p.old, p.places) for p in before]

    def _remove(self) -> None:
        if self._removes:
            return
        self._removes = True
        try:
            while self._patches:
                self._patches[-1].undo()  # if it raises, the next call tries it again
                self._patches.pop()
        finally:
            self._removes = False
