"""Unsloth models over a spectral paged cache: `patch_unsloth_attention(model)` and back.

```python
model, tokenizer = FastLanguageModel.from_pretrained(...)
patch_unsloth_attention(model)
model.generate(**tokenizer(prompts, padding=True, return_tensors="pt").to("cuda"))
unpatch_unsloth_attention(model)
```
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from typing import Any, Unpack

from spectral_paged.errors import FormatError, PatchError
from spectral_paged.integrations.unsloth.attention import FunctionPatches
from spectral_paged.integrations.unsloth.calibration import unsloth_calibration
from spectral_paged.integrations.unsloth.families import (
    causal_lm,
    family_of,
    loaded_unsloth,
    unsloth_module,
)
from spectral_paged.integrations.unsloth.generation import PatchedForward, SpectralPast
from spectral_paged.integrations.unsloth.graphs import GRAPHED, UnslothGraphs
from spectral_paged.integrations.unsloth.rotary import rotary_tables
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.models.cache_for_model import longest_sequence, model_cache, model_format
from spectral_paged.models.calibration import calibration_obstacle
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.linear_weights import is_plain
from spectral_paged.models.loader import LoadedModel
from spectral_paged.options import CacheOptions, CacheOptionsDict
from spectral_paged.pages import AUTO, PageFormat

_functions = FunctionPatches()
# a model's attribute that refers to its patch, so that both are garbage-collected together
PATCH = "_spectral_paged_patch"
INT8_WIDTH = 128  # head width at which INT8 ranks were measured to lose no needle
_NOTHING = object()  # stands for an attribute that a model did not have


class UnslothPatch:
    """A patched model, with its cache and statistics.

    Attributes:
        model: the causal LM whose `forward` is replaced.
        cache: stores its keys and values; deleted, with its memory, once the patch is undone.
    """

    def __init__(self, model: Any, forward: PatchedForward) -> None:
        self.model = model
        self.cache = forward.cache
        self._forward = forward
        self._saved: dict[str, Any] = {}
        for name, value in {
            PATCH: self,
            "forward": forward,
            # else `generate` passes a static cache for families that Unsloth compiles
            "_supports_static_cache": False,
            "_reorder_cache": SpectralPast.reorder_cache,
        }.items():
            self._saved[name] = vars(model).get(name, _NOTHING)
            setattr(model, name, value)
        weakref.finalize(self, _functions.remove_unused).atexit = False

    @property
    def _is_in_force(self) -> bool:
        return vars(self.model).get(PATCH) is self

    def settle(self) -> None:
        """Wait for the checks of all sealed blocks; an undone patch has settled already.

        On CUDA the next step reads the checks of a step. After the last step of a batch only this
        method does.

        Raises:
            NonFiniteError: NaN or Inf that no forward has reported; raised once.
        """
        if self._is_in_force:
            self._forward.batches.settle()

    def stats(self) -> dict[str, object]:
        """`SpectralKVCache.stats()` and counts of forwards, after rows no longer used are freed.

        Raises:
            PatchError: the patch is undone.
            NonFiniteError: as `settle`.
        """
        if not self._is_in_force:
            raise PatchError("the patch is undone, and its cache is gone: ask for stats before")
        self._forward.batches.settle()
        return self.cache.stats() | {
            "prompt_steps": self._forward.num_prompt_steps,
            "decode_steps": self._forward.num_decode_steps,
            "num_graphs": 0 if self._forward.graphs is None else self._forward.graphs.num_graphs,
        }

    def undo(self) -> None:
        """Undo the patch, as `unpatch_unsloth_attention` does; a second call does nothing.

        Raises:
            PatchError: other code replaced the model's forward since, and nothing is changed; or
                one of Unsloth's functions, and only the model is restored: call again when the
                later change is undone.
            NonFiniteError: as `settle`; the patch is undone all the same.
        """
        if not self._is_in_force:
            _functions.remove_unused()
            return
        if vars(self.model).get("forward") is not self._forward:
            raise PatchError(
                "the model's forward was replaced since this patch: undo the later change first"
            )
        try:
            self.settle()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        for name, value in self._saved.items():
            if value is _NOTHING:
                delattr(self.model, name)
            else:
                setattr(self.model, name, value)
        try:
            self._forward.close()
            del self.cache
        finally:
            _functions.release(self.model)


def patch_unsloth_attention(
    model: Any,
    block_size: int = BLOCK_TOKENS,
    k_rank_keys: int | None = None,
    k_rank_values: int | None = None,
    hot_buffer_size: int = 64,
    use_spectral_attention: bool = True,
    use_triton_kernel: bool = True,
    use_attention_weighted_svd: bool = False,
    landmark_count: int | None = None,
    kv_format: str | PageFormat | None = None,
    debug_logging: bool = False,
    verbose: bool = True,
    *,
    gpu_memory_utilization: float = 0.8,
    prefill_segment: int = 2048,
    enforce_eager: bool = False,
    cache_options: CacheOptions | None = None,
    **options: Unpack[CacheOptionsDict],
) -> UnslothPatch:
    """Let a model that Unsloth loaded generate over a paged pool of spectral pages.

    `generate`, streamers and sampling work as before, for batches of left-padded prompts of any
    mix of lengths. Training, losses and passes without `use_cache=True` do not change.

    Args:
        model: the model that `FastLanguageModel.from_pretrained` or `get_peft_model` returned.
        block_size: tokens of a page: 512.
        k_rank_keys, k_rank_values: INT8 components a head of K and of V, multiples of 16. With one
            of them the other is that of `spectral-int8` for the head's width.
        hot_buffer_size: newest tokens that are never sealed; a multiple of 64.
        use_spectral_attention: False is refused: there is no other attention over pages.
        use_triton_kernel: False is refused on CUDA, where there is no other kernel.
        use_attention_weighted_svd: True is refused: it was measured to gain nothing.
        landmark_count: first tokens that always stay exact; a multiple of 64, default the format's
            own (64).
        kv_format: in place of ranks a preset name (`exact`, `spectral-page`) or a `PageFormat`. The
            default is `spectral-quality`. For a model that cannot be calibrated (quantized weights,
            no tokenizer) it is `spectral-int8` for heads of width 128, and `spectral-page` for
            others, because INT8 ranks lose needles at width 64.
        debug_logging: log a line about each prompt at level INFO.
        verbose: print a line about the patched model.
        gpu_memory_utilization: share of the GPU for the pool and all memory in use now.
        prefill_segment: prompt tokens whose queries see each other exactly.
        enforce_eager: no CUDA graphs of one-token steps (llama, mistral, qwen2, qwen3).
        cache_options, **options: `CacheOptions`, or its fields by name; prefix caching is off.

    Raises:
        TypeError: an option does not exist.
        UnsupportedModelError: Unsloth's version or the family is another one, or Unsloth did not
            load the model; the message names what is supported.
        PatchError: the model is patched already.
        FormatError, CapacityError: an option's value cannot be served; the message names one that
            can.
    """
    chosen = CacheOptions.of(
        patch_unsloth_attention,
        cache_options,
        options,
        # adapters may change between two calls, and with them the K and V of a prefix
        enable_prefix_caching=False,
    )
    version = loaded_unsloth().__version__
    inner = causal_lm(model)
    if PATCH in vars(inner):
        raise PatchError("this model is patched already: unpatch_unsloth_attention(model) first")
    family = family_of(inner)
    _check_options(
        block_size,
        use_spectral_attention,
        use_triton_kernel or inner.device.type != "cuda",
        use_attention_weighted_svd,
    )
    geometry = ModelGeometry.from_config(inner.config)
    tokenizer = getattr(inner, "_saved_temp_tokenizer", None)
    loaded = LoadedModel("unsloth", inner, tokenizer, geometry)
    if kv_format is None and k_rank_keys is None and k_rank_values is None:
        kv_format = _default_format(loaded)
    format = _format(
        geometry,
        kv_format,
        k_rank_keys,
        k_rank_values,
        prefill_segment=prefill_segment,
        hot_tokens=hot_buffer_size,
        landmarks=landmark_count,
    )
    if not format.prefill_segment:
        raise FormatError(
            f"format {format.name!r} has prefill_segment=0, so what a row's queries see would "
            "depend on the rows beside it, with which prompts are cut: use a multiple of 512"
        )
    # K and V of the last unpatched batch, which Unsloth keeps until the next prompt
    unsloth_module("_decode_graphs").release_for_training(inner)
    _functions.install(inner)
    try:
        if format.needs_calibration and chosen.calibration == "auto" and family.is_fast:
            calibration = unsloth_calibration(model, loaded)
            chosen = dataclasses.replace(chosen, calibration=calibration)
        cache = model_cache(
            loaded,
            format,
            chosen,
            gpu_memory_utilization=gpu_memory_utilization,
            ropes=rotary_tables(inner, longest_sequence(geometry, chosen.max_model_len)),
        )
        graphed = inner.config.model_type in GRAPHED and inner.device.type == "cuda"
        graphs = UnslothGraphs(inner, cache) if graphed and not enforce_eager else None
        level = logging.INFO if debug_logging else logging.DEBUG
        forward = PatchedForward(
            inner, cache, is_fast=family.is_fast, graphs=graphs, report_level=level
        )
        patch = UnslothPatch(inner, forward)
    except BaseException:
        _functions.release(inner)
        raise
    if verbose:
        print(
            f"spectral_paged: {type(inner).__name__} of unsloth {version} patched; format "
            f"{format.name}, {cache.capacity_tokens:,} tokens of cache on {inner.device}"
        )
    return patch


def unpatch_unsloth_attention(model: Any) -> None:
    """Restore the model's own attention, and with the last model also Unsloth's functions.

    Raises:
        PatchError: the model is not patched, or as `UnslothPatch.undo`.
        NonFiniteError: as `UnslothPatch.settle`; the model is unpatched all the same.
    """
    patch = vars(causal_lm(model)).get(PATCH)
    if patch is None:
        raise PatchError("this model is not patched: there is nothing to undo")
    patch.undo()


def _check_options(block_size: int, spectral: bool, triton: bool, weighted: bool) -> None:
    if block_size != BLOCK_TOKENS:
        raise FormatError(
            f"block_size is {block_size}; a page holds {BLOCK_TOKENS} tokens: leave it out"
        )
    if not spectral:
        raise FormatError(
            "use_spectral_attention=False would rebuild K and V in memory, which is not done here: "
            "use kv_format='exact' for exact attention over the paged pool, or do not patch"
        )
    if not triton:
        raise FormatError(
            "use_triton_kernel=False: on CUDA pages are read by Triton kernels alone; leave it True"
        )
    if weighted:
        raise FormatError(
            "use_attention_weighted_svd=True keeps queries, costs memory and was measured to gain "
            "nothing: leave it False, or give a kv_format with dim_weighting='calibrated'"
        )


def _default_format(loaded: LoadedModel) -> str:
    """The default format; for a model without a calibration of its own, one that needs none.

    Unsloth's forward over packed weights was never compared with their matrices.
    """
    plain = all(is_plain(layer.self_attn.o_proj) for layer in loaded.model.model.layers)
    if plain and calibration_obstacle(loaded) is None:
        return AUTO
    return "spectral-int8" if loaded.geometry.head_dim == INT8_WIDTH else "spectral-page"


def _format(
    geometry: ModelGeometry,
    kv_format: str | PageFormat | None,
    k_rank: int | None,
    v_rank: int | None,
    *,
    prefill_segment: int,
    hot_tokens: int,
    landmarks: int | None,
) -> PageFormat:
    if kv_format is not None and (k_rank is not None or v_rank is not None):
        raise FormatError(
            "kv_format fixes the ranks: leave k_rank_keys and k_rank_values out, or kv_format"
        )
    format = model_format(kv_format or "spectral-int8", geometry, prefill_segment=prefill_segment)
    if isinstance(kv_format, PageFormat):
        own = format.num_landmark_tokens, format.hot_tokens, format.prefill_segment
        if (
            landmarks not in (None, own[0])
            or hot_tokens not in (64, own[1])
            or prefill_segment not in (2048, own[2])
        ):
            raise FormatError(
                f"the PageFormat that is given has {own[0]} landmarks, {own[1]} hot tokens and "
                f"segments of {own[2]} of its own: leave landmark_count, hot_buffer_size and "
                "prefill_segment out"
            )
        return format
    if k_rank is not None or v_rank is not None:
        k_rank = format.k_rank if k_rank is None else k_rank
        v_rank = format.v_rank if v_rank is None else v_rank
        format = dataclasses.replace(
            format,
            name=f"spectral-int8-{k_rank}-{v_rank}",
            k_bands=((k_rank, 8),),
            v_bands=((v_rank, 8),),
        )
    return dataclasses.replace(
        format,
        num_landmark_tokens=format.num_landmark_tokens if landmarks is None else landmarks,
        hot_tokens=hot_tokens,
    )
