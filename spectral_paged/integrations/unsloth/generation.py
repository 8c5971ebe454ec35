"""Generation of an Unsloth model over a `SpectralKVCache`: what its `forward` does while patched.

```
model.generate(ids [B, L], mask)                       a padded batch, transformers' own loop
  forward, prompt   pads stripped, rows laid end to end [1, T], chunk by chunk as the format wants
  forward, 1 token  Unsloth's one-token step over the B rows
```
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from spectral_paged.cache import SpectralKVCache
from spectral_paged.device import upload
from spectral_paged.errors import CapacityError, InvalidRequestError, NonFiniteError
from spectral_paged.integrations.padded_rows import PaddedRows
from spectral_paged.integrations.unsloth.attention import (
    ServedStep,
    run_prompt,
    serving,
    without_autocast,
)
from spectral_paged.integrations.unsloth.graphs import UnslothGraphs
from spectral_paged.integrations.unsloth.prompt import PromptChunk, PromptTokens
from spectral_paged.models.attention_choice import attending
from spectral_paged.models.runner import ATTENTION_NAME

logger = logging.getLogger(__name__)

_numbers = itertools.count()


class SpectralPast(Sequence[Any]):
    """`past_key_values` of a patched model: says how long it is, and keeps its sequences alive.

    Neither a tuple nor a transformers `Cache`, so that nobody copies K and V out of it: an item is
    a layer's K and V by shape alone, without memory.
    """

    is_compileable = False

    def __init__(self, owner: Any, rows: _Rows) -> None:
        self.owner = owner
        self.rows = rows
        self.num_columns = rows.num_columns
        cache = owner.cache
        self.num_layers = cache.num_layers
        format = cache.format
        shape = len(rows.seq_ids), format.num_kv_heads, self.num_columns, format.head_dim
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
        """Columns of the padded batch, as transformers counts them."""
        return self.num_columns

    def reorder_cache(self, beam_idx: Tensor) -> SpectralPast:
        """Row i goes on as a copy of row `beam_idx[i]`; full pages are shared.

        Raises:
            CapacityError: no room for what copies do not share.
        """
        self.rows.take(self.owner.cache, beam_idx.tolist())
        return self

    def crop(self, *_: Any, **__: Any) -> None:
        raise InvalidRequestError(
            "assisted decoding cuts tokens off the cache, but a sealed page cannot be cut: "
            "generate without an assistant model and prompt lookup"
        )


class _Rows:
    """The sequences of one batch, freed when nobody holds it any more."""

    def __init__(self, owner: Any, count: int) -> None:
        self.seq_ids = [f"unsloth-{next(_numbers)}" for _ in range(count)]
        self.num_columns = 0
        self.is_whole = True  # False: something failed half way, so that rows differ
        self.positions: Tensor | None = None  # int64 [B, 1], where the next token of each row is
        # collected at any moment, inside a step too: noted here, freed by the next call
        weakref.finalize(self, owner.released.extend, self.seq_ids)

    def give_up(self, cache: SpectralKVCache) -> None:
        """Free rows that nobody can go on with, now: the error that says so may be held for long,
        and with its frames this object."""
        self.is_whole = False
        for seq_id in self.seq_ids:
            if seq_id in cache:
                cache.free(seq_id)

    def take(self, cache: SpectralKVCache, sources: list[int]) -> None:
        """Rows become copies of rows `sources`: the first copy is the row itself, others fork."""
        old, used = list(self.seq_ids), set(sources)
        for row, seq_id in enumerate(old):
            if row not in used:
                cache.free(seq_id)
        self.seq_ids[:] = [seq_id for row, seq_id in enumerate(old) if row in used]
        taken: list[str] = []
        for source in sources:
            seq_id = old[source]
            if seq_id in taken:
                seq_id = f"unsloth-{next(_numbers)}"
                if not cache.fork(old[source], seq_id):
                    self.give_up(cache)
                    raise CapacityError(
                        f"no room for what {len(sources)} beams do not share: patch with a larger "
                        "kv_cache_bytes or max_num_seqs, or take fewer beams"
                    )
                self.seq_ids.append(seq_id)
            taken.append(seq_id)
        self.seq_ids[:] = taken
        if self.positions is not None:
            self.positions = self.positions[sources]


class PatchedForward:
    """`forward` of a causal LM that serves generation from `cache` and leaves the rest alone.

    Args:
        model: the causal LM; its `forward` of now is what is called for the layers.
        is_fast: Unsloth has attention functions of its own for it.
        graphs: replays its one-token steps; None: they run as Unsloth runs them.
        report_level: of the log lines about each forward.
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
        self.cache = cache
        self.released: list[str] = []
        self._failed: dict[str, NonFiniteError] = {}  # sequences whose callers have not heard of it
        self.num_prompt_steps = self.num_decode_steps = 0
        self._model = model
        self._forward: Callable[..., Any] = model.forward
        self._names = list(inspect.signature(self._forward).parameters)
        functools.update_wrapper(self, self._forward)  # its signature too: `generate` reads it
        self._is_fast = is_fast
        self.graphs = graphs
        self._level = report_level

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments as the model's own `forward`. Served are calls of a model in eval mode with
        `use_cache=True` and no labels, as `generate` makes them; others pass through.

        Raises:
            CapacityError: the batch does not fit the pool.
            InvalidRequestError: a cache of another kind, a mask or positions that no left-padded
                batch has, or gradients.
        """
        kwargs |= zip(self._names, args, strict=False)
        past = kwargs.get("past_key_values")
        if not isinstance(past, SpectralPast) and not self._is_generation(kwargs):
            return self._forward(**kwargs)
        self._check(kwargs)
        self.collect()
        width = kwargs["input_ids"].shape[1]
        if isinstance(past, SpectralPast) and width == 1:
            logits, rows = self._decode(kwargs["input_ids"], past), past.rows
        else:
            logits, rows = self._prompt(kwargs, past if isinstance(past, SpectralPast) else None)
        rows.num_columns += width
        now = SpectralPast(self, rows)
        if kwargs.get("return_dict") is False:
            return logits, now
        return CausalLMOutputWithPast(logits=logits, past_key_values=now)

    def collect(self) -> None:
        """Free the sequences of batches that nobody holds any more; what is found of them only now
        is no error of the batch that comes next, and kept for `settle`."""
        if self.released:
            self._failed |= self.cache.settle().failed
        while self.released:
            seq_id = self.released.pop()
            if seq_id in self.cache:
                self.cache.free(seq_id)

    def settle(self) -> None:
        """Wait for the checks of all that was sealed. On CUDA those of a step are known after it,
        and looked at by the next one; after the last one nobody would.

        Raises:
            NonFiniteError: NaN or Inf that no forward has told of; told once.
        """
        self.collect()
        found = self._failed | self.cache.settle().failed
        self._failed = {}
        for error in found.values():
            raise error

    def close(self) -> None:
        """Let go of the cache and of graphs over it; `past_key_values` that are still held are of
        no use any more."""
        if self.graphs is not None:
            self.graphs.drop()
        self.graphs = None
        del self.cache

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
            if not past.rows.is_whole:
                raise InvalidRequestError(
                    "a forward over past_key_values failed half way: start without it"
                )
            if past.num_columns != past.rows.num_columns:
                raise InvalidRequestError(
                    f"past_key_values has {past.num_columns} columns, but its sequences have grown "
                    f"to {past.rows.num_columns}: go on from the newest one"
                )
            if len(kwargs["input_ids"]) != len(past.rows.seq_ids):
                raise InvalidRequestError(
                    f"{len(kwargs['input_ids'])} rows of input_ids for past_key_values of "
                    f"{len(past.rows.seq_ids)}: pass as many"
                )

    # ---- prompts -------------------------------------------------------------------------

    def _prompt(self, kwargs: dict[str, Any], past: SpectralPast | None) -> tuple[Tensor, _Rows]:
        input_ids, positions = kwargs["input_ids"], kwargs.get("position_ids")
        batch_size, width = input_ids.shape
        rows = past.rows if past is not None else _Rows(self, batch_size)
        stored = [self.cache.num_tokens(seq_id) if past else 0 for seq_id in rows.seq_ids]
        padded = PaddedRows.of(
            batch_size,
            width,
            stored,
            rows.num_columns,
            attention_mask=kwargs.get("attention_mask"),
            # in a conversation transformers passes those of earlier columns too
            position_ids=None if positions is None else positions[..., -width:],
            device=self.cache.device,
        )
        keep = max(_count(kwargs.get("logits_to_keep")), _count(kwargs.get("num_logits_to_keep")))
        tokens = PromptTokens(padded, keep)
        logger.log(self._level, "prompt of %d rows, %d tokens", batch_size, sum(padded.num_new))
        try:
            if past is None:
                self._add(rows, padded.num_new)
            if self.graphs is not None:
                self.graphs.refresh()
            self._run_chunks(rows, padded, tokens, input_ids)
        except BaseException:
            rows.give_up(self.cache)
            raise
        ends = [self.cache.num_tokens(seq_id) for seq_id in rows.seq_ids]
        rows.positions = upload(ends, torch.long, self.cache.device).unsqueeze(1)
        assert tokens.logits is not None  # the last column of every row is a token
        return tokens.logits, rows

    def _run_chunks(
        self, rows: _Rows, padded: PaddedRows, tokens: PromptTokens, input_ids: Tensor
    ) -> None:
        """Compute a prompt chunk by chunk; the logits that are wanted are stored in `tokens`."""
        while chunk := tokens.next_chunk(lambda row: self.cache.chunk_limit(rows.seq_ids[row])):
            new_tokens = {rows.seq_ids[row]: count for row, count in chunk.lengths.items()}
            with self._step(rows, new_tokens):
                ids = input_ids.reshape(-1)[chunk.places]
                where = padded.position_ids.reshape(-1)[chunk.places]
                step = ServedStep(self.cache, order=chunk.order)
                part = self._run_prompt(step, ids, where, chunk)
            if chunk.num_wanted:
                tokens.store(chunk, part)
            self.num_prompt_steps += 1

    def _add(self, rows: _Rows, num_new: Sequence[int]) -> None:
        for seq_id, count in zip(rows.seq_ids, num_new, strict=True):
            if self.cache.add_sequence(seq_id, num_prompt_tokens=count) is None:
                raise CapacityError(
                    f"a batch of {len(num_new)} rows does not fit: the cache holds "
                    f"{self.cache.max_num_seqs} sequences at a time; patch with a larger "
                    "max_num_seqs, drop past_key_values that are not needed, or split the batch"
                )

    def _run_prompt(
        self, step: ServedStep, ids: Tensor, positions: Tensor, chunk: PromptChunk
    ) -> Tensor:
        """Logits `[num_wanted or 1, vocab]` of ids and positions `[T]`."""
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
        """Through transformers' attention interface: ids and positions `[T]`."""
        with attending(self._model, ATTENTION_NAME):
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
        rows = past.rows
        assert rows.positions is not None
        with self._step(rows, dict.fromkeys(rows.seq_ids, 1)):
            step = ServedStep(self.cache)
            if self.graphs is not None and self.graphs.is_ready:
                logits = self.graphs.run(input_ids)
            elif self._is_fast:
                with serving(step):
                    output = self._forward(
                        input_ids=input_ids,
                        position_ids=rows.positions,
                        past_key_values=past,
                        attention_mask=None,
                        return_dict=True,
                    )
                logits = output.logits
            else:
                flat = input_ids.reshape(-1), rows.positions.reshape(-1)
                logits = self._run_interface(step, *flat, keep=0).unsqueeze(1)
        rows.positions = rows.positions + 1
        self.num_decode_steps += 1
        return logits

    @contextmanager
    def _step(self, rows: _Rows, new_tokens: dict[str, int]) -> Iterator[None]:
        """A step of the cache around a forward over some of `rows`."""
        cache = self.cache
        self._raise_failed(rows)
        plan = cache.reserve(new_tokens)
        if plan is None:
            longest = max(cache.num_tokens(seq_id) for seq_id in new_tokens)
            raise CapacityError(
                f"a batch of {len(rows.seq_ids)} rows does not fit any more at {longest} tokens: "
                f"the pool holds {cache.capacity_tokens} tokens in all; patch with a larger "
                "kv_cache_bytes, drop past_key_values that are not needed, or split the batch"
            )
        try:
            with without_autocast(cache.device):
                cache.begin_step(plan)
            yield
        except BaseException:
            cache.abort_step()
            for seq_id in new_tokens:  # where no step was open yet
                cache.cancel_reservation(seq_id)
            raise
        try:
            with without_autocast(cache.device):
                self._failed |= cache.end_step().failed
            self._raise_failed(rows)
        except BaseException:  # its tokens count as stored, but the caller does not hear of it
            rows.give_up(cache)
            raise

    def _raise_failed(self, rows: _Rows) -> None:
        """Give up `rows` with NaN or Inf; those of other batches are for their own next step."""
        found = [self._failed.pop(s) for s in rows.seq_ids if s in self._failed]
        if found:
            rows.give_up(self.cache)
            raise found[0]


def _count(logits_to_keep: Any) -> int:
    if isinstance(logits_to_keep, Tensor):
        raise InvalidRequestError(
            "logits_to_keep is a tensor; a patched model takes how many of the last columns"
        )
    return int(logits_to_keep or 0)
