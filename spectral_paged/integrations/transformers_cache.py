"""A `transformers.Cache` over spectral pages, for the stock `generate`.

```
model.set_attn_implementation(ATTENTION_NAME)
cache = SpectralPagedCache(model)
model.generate(**inputs, past_key_values=cache)
pipe(texts, past_key_values=SpectralPagedCache(model, auto_reset=True), batch_size=8)
```

A forward of the model is one step of a `SpectralKVCache`: hooks on the decoder open it before the
first layer and close it after the last, so a forward that fails stores no tokens. All tokens of one
forward see each other exactly (`prefill_segment=0`), also in a long one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NoReturn, Unpack

import torch
from torch import Tensor
from transformers import Cache

from spectral_paged.cache import read_history
from spectral_paged.errors import CapacityError, InvalidRequestError, PoolError
from spectral_paged.integrations.cached_attention import ATTENTION_NAME, CACHE_OPTION
from spectral_paged.integrations.forward_hooks import watch, watch_generate
from spectral_paged.integrations.padded_rows import PaddedRows
from spectral_paged.integrations.row_batch import Remedies, RowBatches, without_autocast
from spectral_paged.integrations.stored_columns import StoredColumns
from spectral_paged.models.cache_for_model import model_cache, model_format
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel, tokenizer_of
from spectral_paged.options import CacheOptions, CacheOptionsDict
from spectral_paged.pages import PageFormat

ANOTHER_PROMPT = (
    "call reset() before another prompt, or make the cache with auto_reset=True, for a pipeline "
    "whose batches are prompts each"
)


@dataclass(slots=True)
class _Forward:
    """One forward of the decoder, from its first layer to its last."""

    rows: PaddedRows
    token_ids: Tensor | None
    has_tokens: bool
    num_layers: int = 0  # layers that attended, or took materialized K and V


class SpectralPagedCache(Cache):  # type: ignore[misc]
    """Paged KV cache for a transformers model, sealed into spectral pages while it fills.

    Args:
        model: the causal LM that will generate. Its attention must be `ATTENTION_NAME`, unless
            `materialize`.
        kv_format: preset name, `exact`, or a `PageFormat`, whose `prefill_segment` is ignored,
            because a forward is a segment.
        gpu_memory_utilization: share of GPU memory for weights and cache; activations and logits
            of `generate` need the rest.
        tokenizer: for `calibration="auto"` where the model was not calibrated before; default the
            one of `model.name_or_path`.
        materialize: let `update` return all K and V, rebuilt from pages, to any attention: slow,
            for comparisons and for attention that must see keys. The cache stays as small.
        auto_reset: a prompt of `generate` that does not go on from the stored tokens begins a new
            batch, as a pipeline's next one does; by default it is refused.
        cache_options, **options: `CacheOptions`, or its fields by name. `max_num_seqs` counts rows
            of a batch (times `num_return_sequences` or `num_beams`); prefix caching is off.

    Raises:
        TypeError: an option does not exist.
        UnsupportedModelError: the model is not served.
        InvalidRequestError: the model has another attention or lies on several devices, or there is
            no tokenizer for calibration.
        FormatError, CapacityError, CorruptFileError: as `LLM`.
    """

    def __init__(
        self,
        model: Any,
        kv_format: str | PageFormat = "auto",
        *,
        gpu_memory_utilization: float = 0.8,
        tokenizer: Any = None,
        materialize: bool = False,
        auto_reset: bool = False,
        cache_options: CacheOptions | None = None,
        **options: Unpack[CacheOptionsDict],
    ) -> None:
        chosen = CacheOptions.of(
            SpectralPagedCache, cache_options, options, enable_prefix_caching=False
        )
        super().__init__(layers=[])
        if hasattr(model, "get_base_model"):  # adapters around a model
            model = model.get_base_model()
        self.materialize = materialize
        self.auto_reset = auto_reset
        self._decoder = model.get_decoder()
        self._check_attention()
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) > 1:
            raise InvalidRequestError(
                f"the model lies on {', '.join(devices)}; the cache has one device: load the model "
                "on one"
            )
        geometry = ModelGeometry.from_config(model.config)
        format = dataclasses.replace(model_format(kv_format, geometry), prefill_segment=0)
        if format.needs_calibration and tokenizer is None and chosen.calibration == "auto":
            tokenizer = tokenizer_of(model)
        self.kv_cache = model_cache(
            LoadedModel(type(model).__name__, model, tokenizer, geometry),
            format,
            chosen,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        more_room = f"raise kv_cache_bytes ({self.kv_cache.num_bytes} now)"
        remedies = Remedies(
            tokens=f"{more_room}, take a smaller batch, or pass prefill_chunk_size to generate, "
            "which stores a prompt piece by piece and seals it meanwhile",
            copies=f"the cache was reset: {more_room}",
            sequences="make it with a larger max_num_seqs",
            failed="call reset()",
        )
        self._batches = RowBatches(self.kv_cache, remedies)
        self._rows = self._batches.new(0)
        self._forward: _Forward | None = None
        self._stored = StoredColumns()
        watch(self._decoder)
        watch_generate(model)

    # ---- a prompt of `generate` ----------------------------------------------------------

    def begin_generate(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Compare a prompt with the stored tokens, from which `generate` would go on unseen.

        Args:
            input_ids: `[B, T]`, all tokens so far, or the new ones alone beside a wider mask.

        Raises:
            InvalidRequestError: the prompt does not begin with the stored tokens, without
                `auto_reset`. Rows and masks that do not fit are left to the forward.
            NonFiniteError: as `reset`, which `auto_reset` calls.
        """
        num_columns = self._rows.num_columns
        only_new = attention_mask is not None and attention_mask.shape[1] != input_ids.shape[1]
        if not num_columns or only_new:
            return
        goes_on = self._stored.begin(input_ids, attention_mask)
        if self.auto_reset:
            if not goes_on or len(self._rows) != len(input_ids):  # copies, perhaps of another count
                self.reset()
        elif not goes_on and self._shows_stored(attention_mask):
            raise InvalidRequestError(
                f"the prompt does not begin with the tokens of the {num_columns} columns that the "
                f"cache holds: {ANOTHER_PROMPT}"
            )

    def _shows_stored(self, attention_mask: Tensor | None) -> bool:
        """Return whether a mask shows as many tokens of the stored columns as there are."""
        num_columns, stored = self._rows.num_columns, self._rows.num_tokens()
        if attention_mask is None or attention_mask.shape[1] <= num_columns:
            return True
        shown = attention_mask[:, :num_columns].sum(1)
        counts = shown.repeat_interleave(max(1, len(stored) // len(shown))).tolist()
        return bool(counts == stored)

    # ---- a forward of the decoder --------------------------------------------------------

    def begin_forward(self, decoder: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Open a step for a forward of `decoder` over `inputs`, and return the changed inputs.

        Raises:
            InvalidRequestError: the model or its attention is another one, attention weights are
                requested, or the inputs do not continue the stored columns.
            CapacityError: the tokens do not fit.
            NonFiniteError: as `end_forward`.
        """
        if decoder is not self._decoder:
            raise InvalidRequestError(
                "this SpectralPagedCache was made for another model: make one for this model"
            )
        self._check_attention()
        if inputs.get("output_attentions") and not self.materialize:
            raise InvalidRequestError(
                "output_attentions: attention over pages makes no weights to return; leave it out, "
                "or pass materialize=True and take eager attention"
            )
        self._abandon()  # a forward that was interrupted
        token_ids = inputs.get("input_ids")
        taken = inputs.get("inputs_embeds") if token_ids is None else token_ids
        if taken is None:
            return inputs  # the model raises for its missing input
        batch_size, width = taken.shape[:2]
        self._check_batch(batch_size)
        rows = self._rows if len(self._rows) else self._batches.new(batch_size)
        padded = rows.read(
            width,
            attention_mask=inputs.get("attention_mask"),
            position_ids=inputs.get("position_ids"),
        )
        self._rows = rows
        num_new = {row: num for row, num in enumerate(padded.num_new) if num}
        try:
            if num_new:
                rows.begin_step(num_new)
        except BaseException:
            self._abandon()
            raise
        self._forward = _Forward(padded, token_ids, has_tokens=bool(num_new))
        changed = inputs | {"position_ids": padded.position_ids}
        if not self.materialize:
            # transformers takes a mask of four dimensions as it is, so it makes none
            mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.kv_cache.device)
            changed |= {CACHE_OPTION: self, "attention_mask": mask}
        return changed

    def end_forward(self, *, failed: bool) -> None:
        """Close the step of a forward, or drop its tokens if it failed.

        Raises:
            NonFiniteError: a sealed block has NaN or Inf, on CUDA one of an earlier forward
                (`settle` reports the last forward's); `reset()` before going on.
            PoolError: some layers did not attend through the cache.
        """
        forward = self._forward
        if forward is None:
            return
        if failed or forward.num_layers != self.kv_cache.num_layers:
            self._abandon()
            if not failed:
                raise PoolError(
                    f"{forward.num_layers} of {self.kv_cache.num_layers} layers attended through "
                    f"the cache: {type(self._decoder).__name__} does not hand its options to "
                    "attention, or skips layers, and cannot use a SpectralPagedCache"
                )
            return
        self._forward = None
        if forward.has_tokens:
            self._rows.end_step()
        self._rows.num_columns += forward.rows.width
        self._stored.add(forward.token_ids)

    def settle(self) -> None:
        """Wait, between forwards, for the checks of all sealed blocks.

        On CUDA the checks of a forward end after it, and the next forward reads them. After the
        last forward only this method does.

        Raises:
            NonFiniteError: a sealed block has NaN or Inf; raised once. `reset()` before going on.
        """
        self._batches.settle()

    def _abandon(self) -> None:
        """Drop a forward that did not end, and its rows if it was their first."""
        self._forward = None
        self._rows.abort_step()
        if not self._rows.num_columns:
            self._forget()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Take K and V `[B, Hkv, T, D]` of one layer's new columns, after RoPE.

        Returns:
            The same tensors, because `ATTENTION_NAME` stores them; with `materialize` those of all
            columns so far, `[B, Hkv, columns, D]`.
        """
        if self._forward is None:
            raise InvalidRequestError(
                "update outside a forward of the model that this SpectralPagedCache was made for: "
                "make one for this model, and pass past_key_values by keyword"
            )
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise InvalidRequestError(
                "a SpectralPagedCache keeps no gradients: run the model under torch.no_grad(), or "
                "train with use_cache=False"
            )
        if not self.materialize:
            return key_states, value_states
        rows = self._forward.rows
        self._forward.num_layers += 1
        seen: list[tuple[Tensor, Tensor]] = []
        if self._forward.has_tokens:
            with without_autocast(self.kv_cache.device):
                self.kv_cache.append(layer_idx, *map(rows.flatten, (key_states, value_states)))
                seen = read_history(self.kv_cache, layer_idx)
        computed = [row for row, num in enumerate(rows.num_new) if num]
        keys, values = (
            rows.columns(dict(zip(computed, side, strict=True)), key_states)
            for side in (zip(*seen, strict=True) if seen else ((), ()))
        )
        return keys, values

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Store k and v `[B, Hkv, T, D]`, and attend with q `[B, Hq, T, D]`; `[B, T, Hq, D]`."""
        forward = self._forward
        if forward is None:
            raise PoolError("attend outside a forward")
        forward.num_layers += 1
        if not forward.has_tokens:
            return torch.zeros_like(query).transpose(1, 2)
        q, k, v = (forward.rows.flatten(x) for x in (query, key, value))
        with without_autocast(self.kv_cache.device):
            return forward.rows.unflatten(self.kv_cache.attend(layer, q, k, v, sinks))

    # ---- rows ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all rows: the next forward begins a new batch.

        Raises:
            NonFiniteError: as `settle`; the rows are forgotten all the same.
        """
        try:
            self.settle()
        finally:
            self._forget()

    def _forget(self) -> None:
        self._forward = None
        self._rows.abort_step()
        self._rows.give_up()
        self._rows, self._stored = self._batches.new(0), StoredColumns()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace each row i by a copy of row `beam_idx[i]`, which shares its full pages."""
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows `indices`, in this order."""
        self._take(torch.arange(len(self._rows))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; copies share its full pages."""
        self._take([i for i in range(len(self._rows)) for _ in range(repeats)])

    def _take(self, sources: list[int]) -> None:
        self._check_size(len(sources))
        try:
            self._rows.take(sources)
        except CapacityError:
            self._forget()
            raise
        self._stored.take(sources)

    # ---- refusals ------------------------------------------------------------------------

    def _check_attention(self) -> None:
        attention = self._decoder.config._attn_implementation
        if not self.materialize and attention != ATTENTION_NAME:
            raise InvalidRequestError(
                f"the model attends by {attention!r}, which cannot read pages: call "
                f"model.set_attn_implementation({ATTENTION_NAME!r}), or pass materialize=True to "
                "have K and V rebuilt for it (slow)"
            )

    def _check_batch(self, batch_size: int) -> None:
        self._rows.check_whole()
        if len(self._rows) not in (0, batch_size):
            raise InvalidRequestError(
                f"the batch has {batch_size} rows, the cache holds {self.get_seq_length()} columns "
                f"of {len(self._rows)}: {ANOTHER_PROMPT}"
            )
        self._check_size(batch_size)

    def _check_size(self, batch_size: int) -> None:
        if batch_size > self.kv_cache.max_num_seqs:
            raise InvalidRequestError(
                f"the batch has {batch_size} rows; this cache takes "
                f"{self.kv_cache.max_num_seqs}: make it with max_num_seqs={batch_size}"
            )

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Raise InvalidRequestError, because sealed tokens cannot be removed."""
        raise InvalidRequestError(
            "a SpectralPagedCache cannot take tokens back, because what is sealed cannot be "
            "unsealed: assisted decoding and prompt lookup need a DynamicCache"
        )

    def activate_past_recording(self) -> NoReturn:
        """Raise InvalidRequestError: assisted decoding calls this before it begins."""
        self.crop(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise InvalidRequestError(
            "a SpectralPagedCache is not copied, for its arenas are allocated once: compute a "
            "common beginning with one row and use batch_repeat_interleave, or make a second cache"
        )

    # ---- questions -----------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of stored columns, with padding, as transformers counts them."""
        return self._rows.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of columns that a mask covers with `query_length` new ones, and offset 0."""
        return self._rows.num_columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens that a row may have."""
        return self.kv_cache.max_model_len

    get_max_cache_shape = get_max_length

    def __len__(self) -> int:
        return self.kv_cache.num_layers

    @property
    def batch_size(self) -> int:
        """The number of rows; -1 before the first forward."""
        return len(self._rows) or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_linear(self) -> list[bool]:
        """For each layer, False: `generate` cuts off stored tokens unless all layers are linear."""
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        return False

    def stats(self) -> dict[str, object]:
        """`SpectralKVCache.stats` with `num_rows` and `num_columns`, after `settle`."""
        self.settle()
        rows = {"num_rows": len(self._rows), "num_columns": self._rows.num_columns}
        return self.kv_cache.stats() | rows

    def __repr__(self) -> str:
        return (
            f"SpectralPagedCache({self.kv_cache.format.name!r}, {len(self._rows)} rows of "
            f"{self._rows.num_columns} columns, {self.kv_cache.num_bytes} bytes"
            f"{', materialize=True' if self.materialize else ''})"
        )
