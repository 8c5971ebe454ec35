"""The `forward` of a patched Unsloth model, which generates over a `SpectralKVCache`.

```
model.generate(ids [B, L], mask)                       a padded batch, transformers' own loop
  forward, prompt   pads stripped, rows laid end to end [1, T], chunk by chunk as the format wants
  forward, 1 token  Unsloth's one-token step over the B rows
```
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from spectral_paged.cache import SpectralKVCache
from spectral_paged.device import upload
from spectral_paged.errors import InvalidRequestError
from spectral_paged.integrations.padded_rows import PaddedRows
from spectral_paged.integrations.row_batch import Remedies, RowBatch, RowBatches
from spectral_paged.integrations.unsloth.attention import ServedStep, run_prompt, serving
from spectral_paged.integrations.unsloth.graphs import UnslothGraphs
from spectral_paged.integrations.unsloth.prompt import PromptChunk, PromptTokens
from spectral_paged.models.attention_choice import use_attention
from spectral_paged.models.runner import PAGED_ATTENTION

logger = logging.getLogger(__name__)

_FEWER_ROWS = "drop past_key_values that are not needed, or split the batch"
REMEDIES = Remedies(
    tokens=f"patch with a larger kv_cache_bytes, {_FEWER_ROWS}",
    copies="patch with a larger kv_cache_bytes or max_num_seqs, or take fewer beams",
    sequences=f"patch with a larger max_num_seqs, {_FEWER_ROWS}",
    failed="start without past_key_values",
)


class SpectralPast(Sequence[Any]):
    """`past_key_values` of a patched model: it has their length, and keeps its sequences alive.

    It is neither a tuple nor a transformers `Cache`, so that no caller copies K and V out of it. An
    item is a layer's K and V with only their shape, without memory.

    Args:
        owner: the patched forward that made it.
        rows: the batch's sequences; newer objects of the batch share them.
        positions: int64 `[B, 1]`, the position of each row's next token.
    """

    is_compileable = False

    def __init__(self, owner: PatchedForward, rows: RowBatch, positions: Tensor) -> None:
        self.owner = owner
        self.rows = rows
        self.positions = positions
        self.num_columns = rows.num_columns
        cache = owner.cache
        self.num_layers = cache.num_layers
        format = cache.format
        shape = len(rows), format.num_kv_heads, self.num_columns, format.head_dim
        nothing = torch.empty((), dtype=cache.dtype, device=cache.device).expand(shape)
        self.pair = nothing, nothing

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [self.pair] * len(range(len(self))[layer])
        if not -len(self) <= layer < len(self):
            raise IndexError(layer)
        return self.pair

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of columns of the padded batch, as transformers counts them."""
        return self.num_columns

    def reorder_cache(self, beam_idx: Tensor) -> SpectralPast:
        """Replace each row i by a copy of row `beam_idx[i]`, which shares its full pages.

        Raises:
            CapacityError: the unshared tokens of copies do not fit.
            InvalidRequestError: the rows have grown since, or a forward over them failed.
        """
        self.check_newest()
        self.rows.take(beam_idx.tolist())
        self.positions = self.positions[beam_idx]
        return self

    def check_newest(self) -> None:
        """Raise InvalidRequestError if the rows were given up, or have grown since."""
        self.rows.check_whole()
        if self.num_columns != self.rows.num_columns:
            raise InvalidRequestError(
                f"past_key_values has {self.num_columns} columns, but its sequences have grown "
                f"to {self.rows.num_columns}: go on from the newest one"
            )

    def crop(self, *_: Any, **__: Any) -> None:
        raise InvalidRequestError(
            "assisted decoding cuts tokens off the cache, but a sealed page cannot be cut: "
            "generate without an assistant model and prompt lookup"
        )


class PatchedForward:
    """The `forward` of a causal LM that serves generation from `cache` and passes on other calls.

    Args:
        model: the causal LM; its present `forward` is called for the layers.
        is_fast: Unsloth has attention functions for the family.
        graphs: replays one-token steps; None runs them as Unsloth does.
        report_level: logging level of the line about each prompt.
    """

    def __init__(
        self,
        model: Any,
        cache: SpectralKVCache,
        *,
        is_fast: bool,
        graphs: UnslothGraphs | None,
        report_level: int,
    ) -> None:
        self.batches = RowBatches(cache, REMEDIES)
        self.num_prompt_steps = self.num_decode_steps = 0
        self._model = model
        self._forward: Callable[..., Any] = model.forward
        self._names = list(inspect.signature(self._forward).parameters)
        functools.update_wrapper(self, self._forward)  # its signature too: `generate` reads it
        self._is_fast = is_fast
        self.graphs = graphs
        self._level = report_level

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute a forward; the arguments are those of the model's own `forward`.

        The cache serves calls in eval mode with `use_cache=True` and no labels, as `generate` makes
        them. Other calls go to the model's own `forward`.

        Raises:
            CapacityError: the batch does not fit the pool.
            InvalidRequestError: the cache is of another kind, no left-padded batch has this mask or
                these positions, or gradients are enabled.
        """
        kwargs |= zip(self._names, args, strict=False)
        past = kwargs.get("past_key_values")
        if not isinstance(past, SpectralPast) and not self._is_generation(kwargs):
            return self._forward(**kwargs)
        self._check(kwargs)
        self.batches.collect()
        input_ids = kwargs["input_ids"]
        rows = past.rows if isinstance(past, SpectralPast) else self.batches.new(len(input_ids))
        if isinstance(past, SpectralPast) and input_ids.shape[1] == 1:
            logits, positions = self._decode(input_ids, past), past.positions + 1
        else:
            logits, positions = self._prompt(kwargs, rows)
        rows.num_columns += input_ids.shape[1]
        now = SpectralPast(self, rows, positions)
        if kwargs.get("return_dict") is False:
            return logits, now
        return CausalLMOutputWithPast(logits=logits, past_key_values=now)

    @property
    def cache(self) -> SpectralKVCache:
        """The cache that stores keys and values."""
        return self.batches.cache

    def close(self) -> None:
        """Drop the cache and the graphs over it, after which no `past_key_values` can be used."""
        if self.graphs is not None:
            self.graphs.drop()
        self.graphs = None
        del self.batches.cache

    # ---- what is served ------------------------------------------------------------------

    def _is_generation(self, kwargs: dict[str, Any]) -> bool:
        if not kwargs.get("use_cache") or self._model.training:
            return False
        if kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
            return False
        past = kwargs.get("past_key_values")
        empty = isinstance(past, Cache) and past.get_seq_length() == 0
        if past is None or (empty and type(past) is DynamicCache):
            return True
        raise InvalidRequestError(
            f"past_key_values is a {type(past).__name__} that this patched model did not make: "
            "start without one, or unpatch the model to use that cache"
        )

    def _check(self, kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        if torch.is_grad_enabled():
            raise InvalidRequestError(
                "use_cache=True with gradients: pages carry none; call under torch.no_grad(), or "
                "pass use_cache=False for a pass with gradients"
            )
        if kwargs.get("input_ids") is None:
            raise InvalidRequestError("a patched model generates from input_ids: pass token ids")
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise InvalidRequestError(
                "output_attentions and output_hidden_states are not served while the model is "
                "patched: leave them out, or unpatch"
            )
        if isinstance(past, SpectralPast):
            if past.owner is not self:
                raise InvalidRequestError(
                    "past_key_values comes from another model, or from before this one was "
                    "patched anew: start without it"
                )
            past.check_newest()
            if len(kwargs["input_ids"]) != len(past.rows):
                raise InvalidRequestError(
                    f"{len(kwargs['input_ids'])} rows of input_ids for past_key_values of "
                    f"{len(past.rows)}: pass as many"
                )

    # ---- prompts -------------------------------------------------------------------------

    def _prompt(self, kwargs: dict[str, Any], rows: RowBatch) -> tuple[Tensor, Tensor]:
        """The logits that are wanted, and the positions `[B, 1]` of the rows' next tokens."""
        input_ids, positions = kwargs["input_ids"], kwargs.get("position_ids")
        batch_size, width = input_ids.shape
        padded = rows.read(
            width,
            attention_mask=kwargs.get("attention_mask"),
            # in a conversation transformers passes the positions of earlier columns, too
            position_ids=None if positions is None else positions[..., -width:],
        )
        keep = max(_count(kwargs.get("logits_to_keep")), _count(kwargs.get("num_logits_to_keep")))
        tokens = PromptTokens(padded, keep)
        logger.log(self._level, "prompt of %d rows, %d tokens", batch_size, sum(padded.num_new))
        try:
            if not rows.num_columns:
                rows.open(padded.num_new)
            if self.graphs is not None:
                self.graphs.refresh()
            self._run_chunks(rows, padded, tokens, input_ids)
        except BaseException:
            rows.give_up()
            raise
        ends = upload(rows.num_tokens(), torch.long, self.cache.device)
        assert tokens.logits is not None  # the last column of every row is a token
        return tokens.logits, ends.unsqueeze(1)

    def _run_chunks(
        self, rows: RowBatch, padded: PaddedRows, tokens: PromptTokens, input_ids: Tensor
    ) -> None:
        """Compute a prompt chunk by chunk, and store the wanted logits in `tokens`."""
        while chunk := tokens.next_chunk(lambda row: self.cache.chunk_limit(rows.seq_ids[row])):
            with rows.step(chunk.lengths):
                ids = input_ids.reshape(-1)[chunk.places]
                where = padded.position_ids.reshape(-1)[chunk.places]
                step = ServedStep(self.cache, order=chunk.order)
                part = self._run_prompt(step, ids, where, chunk)
            if chunk.num_wanted:
                tokens.store(chunk, part)
            self.num_prompt_steps += 1

    def _run_prompt(
        self, step: ServedStep, ids: Tensor, positions: Tensor, chunk: PromptChunk
    ) -> Tensor:
        """Compute one chunk, ids and positions `[T]`: logits `[num_wanted or 1, vocab]`."""
        keep = max(chunk.num_wanted, 1)
        if not self._is_fast:
            return self._run_interface(step, ids, positions, keep)
        return run_prompt(
            self._model,
            self._forward,
            step,
            ids,
            positions,
            keep=keep,
            lengths=list(chunk.lengths.values()),
        )

    def _run_interface(self, step: ServedStep, ids: Tensor, positions: Tensor, keep: int) -> Tensor:
        """Compute ids and positions `[T]` through transformers' attention interface."""
        with use_attention(self._model, PAGED_ATTENTION):
            output = self._forward(
                input_ids=ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                attention_mask=None,
                use_cache=False,
                logits_to_keep=keep,
                return_dict=True,
                spectral_cache=step,
            )
        return output.logits[0]

    # ---- one token a row -----------------------------------------------------------------

    def _decode(self, input_ids: Tensor, past: SpectralPast) -> Tensor:
        """Logits `[B, 1, vocab]` of one more token of each row."""
        with past.rows.step(dict.fromkeys(range(len(past.rows)), 1)):
            step = ServedStep(self.cache)
            if self.graphs is not None and self.graphs.is_ready:
                logits = self.graphs.run(input_ids, past.rows.num_tokens())
            elif self._is_fast:
                with serving(step):
                    output = self._forward(
                        input_ids=input_ids,
                        position_ids=past.positions,
                        past_key_values=past,
                        attention_mask=None,
                        return_dict=True,
                    )
                logits = output.logits
            else:
                flat = input_ids.reshape(-1), past.positions.reshape(-1)
                logits = self._run_interface(step, *flat, keep=0).unsqueeze(1)
        self.num_decode_steps += 1
        return logits


def _count(logits_to_keep: Any) -> int:
    if isinstance(logits_to_keep, Tensor):
        raise InvalidRequestError(
            "logits_to_keep is a tensor; a patched model takes how many of the last columns"
        )
    return int(logits_to_keep or 0)
