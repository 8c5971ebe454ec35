"""Calibration runs a model over text and keeps the statistics that its pages share."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from spectral_paged.errors import CorruptFileError, FormatError, InvalidRequestError, shown
from spectral_paged.kernels.chunk.reference import ChunkSpans, chunk_attention
from spectral_paged.kernels.math.rotary import rotate, stored_keys
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.models.attention_choice import register_attention, use_attention
from spectral_paged.models.geometry import ModelGeometry, layer_ropes
from spectral_paged.models.kept_files import CALIBRATIONS, cache_folder
from spectral_paged.models.linear_weights import (
    is_plain,
    packed_layers,
    packed_matrix,
    sampled_weights,
    why_not_read,
)
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.weight_copies import weight_copies
from spectral_paged.pages import BASIS_VERSION, BasisAccumulator, PageFormat, SharedBasis
from spectral_paged.rope import RotaryTable

logger = logging.getLogger(__name__)

SKIPPED_TOKENS = 64  # a span's first tokens are attention sinks, which pages never contain
SPAN_BLOCKS = 2
SPAN_TOKENS = SKIPPED_TOKENS + SPAN_BLOCKS * BLOCK_TOKENS
DEFAULT_SPANS = 8
SAMPLE_STRIDE = 7  # one in so many weights is in a fingerprint
NUM_DISTANCES = 64
MAX_DISTANCE = 16384


def model_fingerprint(model: Any) -> str:
    """Return 16 hex digits of shapes, RoPE and a sample of the K and V projections' weights.

    A checkpoint has one fingerprint in every dtype: rounding changes no sign, and the mean size of
    thousands of weights by less than the power of two that counts.
    """
    config = model.config
    shape = (
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        sorted((getattr(config, "rope_parameters", None) or {}).items()),
    )
    digest, size = hashlib.sha256(repr(shape).encode()), 0.0
    for layer in model.model.layers:
        attention = layer.self_attn
        if hasattr(attention, "qkv_proj"):  # one for all three (Phi 3)
            projections = [attention.qkv_proj]
        else:
            projections = [attention.k_proj, attention.v_proj]
        if not all(map(is_plain, projections)):
            digest.update(b"packed")
        for weight in (w for projection in projections for w in sampled_weights(projection, model)):
            sample = weight.detach().flatten()[::SAMPLE_STRIDE].float()
            digest.update(torch.signbit(sample).cpu().numpy().tobytes())
            if weight.dim() > 1:  # a bias is too short for a mean that rounding leaves alone
                size += math.log2(max(float(sample.abs().mean()), sys.float_info.min))
    digest.update(str(round(size)).encode())
    return digest.hexdigest()[:16]


def fingerprint_of(loaded: LoadedModel) -> str:
    """Return a model's fingerprint; one that was quantized here keeps that of its own weights."""
    return loaded.fingerprint or model_fingerprint(loaded.model)


def builtin_text() -> str:
    """Return the package's calibration text: prose, code, tables, notes and dialogue."""
    return resources.files("spectral_paged.data").joinpath("calibration.txt").read_text("utf-8")


def text_spans(
    token_ids: Sequence[int], max_spans: int | None, *, max_length: int = SPAN_TOKENS
) -> Iterator[list[int]]:
    """Yield evenly spaced spans of 64 + 1,024 tokens, or of 64 + 512 where text or model is short.

    Args:
        max_spans: the most spans; None: as many as the text has.
        max_length: number of positions of the model.

    Raises:
        InvalidRequestError: text or model is too short for one block after the first 64 tokens.
    """
    length = SPAN_TOKENS
    if min(len(token_ids), max_length) < length:
        length = SKIPPED_TOKENS + BLOCK_TOKENS
    if max_length < length:
        raise InvalidRequestError(
            f"the model has {max_length} positions; a calibration needs {length}: use "
            "kv_format='exact'"
        )
    count = len(token_ids) // length
    if not count:
        raise InvalidRequestError(
            f"the calibration text has {len(token_ids)} tokens; at least {length} are needed: "
            "name more files with --data"
        )
    taken = count if max_spans is None else min(count, max_spans)
    for i in range(taken):
        start = i * count // taken * length
        yield list(token_ids[start : start + length])


@dataclass(slots=True)
class Recorder:
    """The attention function of a calibration, which attends and accumulates statistics.

    ropes, windows, softcap: the model's, as `SpectralKVCache` takes them.
    moments: second moments of the queries before and after RoPE, fp64 `[2, layers, H, D, D]`.
    """

    accumulator: BasisAccumulator
    ropes: Sequence[RotaryTable | None]
    windows: Sequence[int | None]
    softcap: float | None
    moments: Tensor

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend to one span and add its statistics.

        q `[1, Hq, T, D]`, k and v `[1, H, T, D]` after RoPE, sinks `[Hq]`; returns `[1, T, Hq, D]`.
        """
        rope, heads = self.ropes[layer], k.shape[1]
        if rope is not None:
            q, k = rope.halves(q), rope.halves(k)
        used = slice(SKIPPED_TOKENS, None)
        positions = torch.arange(k.shape[2], device=k.device)[used]
        table = None if rope is None else (rope.cos[positions], rope.sin[positions])
        for start in range(0, len(positions), BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            keys = k[:, :, used][:, :, block]
            turned = dict.fromkeys(("k_pre", "k_frame"), keys)
            if table is not None:
                rows = table[0][block], table[1][block]
                turned = {name: stored_keys(keys, *rows, name[2:]) for name in turned}
            self.accumulator.add([layer], **turned, k_post=keys, v=v[:, :, used][:, :, block])
        seen = q[0, :, used]
        plain = seen if table is None else rotate(seen, *table, inverse=True)
        for i, x in enumerate((plain, seen)):
            groups = x.double().unflatten(0, (heads, -1)).flatten(1, 2)  # [H, G T, D]
            self.moments[i, layer] += (groups.transpose(-1, -2) @ groups).cpu()
        num_tokens = k.shape[2]
        found = chunk_attention(
            q[0].transpose(0, 1),
            k[0],
            v[0],
            scale=scale,
            softcap=self.softcap,
            window=self.windows[layer],
            sinks=sinks,
            spans=ChunkSpans.of([num_tokens], [num_tokens], q.device),
        )
        return found.to(q.dtype).unsqueeze(0)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    recorder: Recorder = options["spectral_recorder"]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    sinks = options.get("s_aux")
    return recorder.attend(module.layer_idx, query, key, value, scale, sinks), None


RECORDING_ATTENTION = register_attention("spectral_paged_calibration", _attention)

# Runs a model over token ids `[1, T]`; each layer's attention is the recorder's `attend`.
Forward = Callable[[Tensor, Recorder], None]


def by_interface(model: Any) -> Forward:
    """Return a `Forward` that uses the attention interface of transformers."""

    def forward(ids: Tensor, recorder: Recorder) -> None:
        with use_attention(model, RECORDING_ATTENTION):
            model.model(
                input_ids=ids, use_cache=False, attention_mask=None, spectral_recorder=recorder
            )

    return forward


def output_moment(model: Any, num_kv_heads: int, head_dim: int) -> Tensor:
    """Return the second moment of the output projection's rows, fp64 `[layers, H, D, D]`.

    The moments of the query heads of one KV head are added.
    """
    moments = []
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj
        if is_plain(projection):
            weight = projection.weight.detach()
        else:
            weight = packed_matrix(projection, model.dtype)
        weight = weight.double().cpu()
        rows = weight.view(len(weight), num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        moments.append((rows.transpose(-1, -2) @ rows).sum(dim=1))
    return torch.stack(moments)


def averaged_over_distances(moment: Tensor, rope: RotaryTable | None) -> Tensor:
    """Average the second moment of queries, rotated by the distance to a key, over distances.

    A query u (before RoPE), d tokens behind a key k (before RoPE), scores (R(d) u) . k. Distances
    are in even ratios from 1 to the end of `rope`. Without rotation (None) the moment is returned.

    Args:
        moment: second moment of u, fp64 `[..., D, D]`.
    """
    if rope is None:
        return moment
    distances = torch.logspace(0, math.log2(rope.max_positions - 1), NUM_DISTANCES, base=2.0)
    total = torch.zeros_like(moment)
    for distance in distances.round().long().tolist():
        cos, sin = rope.cos[distance].cpu(), rope.sin[distance].cpu()
        half = rotate(moment, cos, sin).double()  # rows turned: M R^T
        total += rotate(half.transpose(-1, -2), cos, sin).double()
    return total / NUM_DISTANCES


def calibration_obstacle(loaded: LoadedModel) -> str | None:
    """Return the reason why a model cannot be calibrated and a remedy, or None if it can be."""
    if loaded.tokenizer is None:
        return (
            f"model {loaded.name!r} has no tokenizer, so it cannot be calibrated on text: pass "
            "calibration=SharedBasis.load(...), or a kv_format that needs none (spectral-page)"
        )
    return packed_obstacle(loaded)


def packed_obstacle(loaded: LoadedModel) -> str | None:
    """Return why a model whose weights are packed cannot be calibrated, or None if it can be.

    A calibration reads the matrices of output projections, packed or not. Of weights that were
    quantized here it is made before.
    """
    for layer in loaded.model.model.layers:
        projection = layer.self_attn.o_proj
        if is_plain(projection):
            continue
        reason = "it is calibrated before that"
        if loaded.quantization is None:
            reason = why_not_read(projection, loaded.model.dtype)
        if reason:
            weight = getattr(projection, "weight", None)
            kept = "packed" if weight is None else weight.dtype
            return (
                f"the model's weights are quantized ({kept}), so it cannot be calibrated "
                f"({reason}): take a kv_format that needs no calibration (spectral-int8, "
                "spectral-page)"
            )
    return None


def calibrated_positions(geometry: ModelGeometry) -> int:
    """Return the number of positions of a calibration's rotary tables."""
    return min(MAX_DISTANCE, geometry.max_position_embeddings)


@torch.inference_mode()
def calibrate(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    max_spans: int | None = None,
    progress: bool = False,
    device: torch.device | None = None,
    forward: Forward | None = None,
    ropes: Sequence[RotaryTable | None] | None = None,
) -> SharedBasis:
    """Accumulate statistics of a model over spans of `texts`: two blocks after 64 skipped tokens.

    On a CPU the model runs in fp32, whatever dtype its weights have, unless they are packed.

    Args:
        max_spans: the most spans, evenly spaced over the texts; None takes all.
        progress: show a bar if stderr is a terminal.
        device: computes; default: that of the model, whose weights stay where they are.
        forward: runs a model that attends by code of its own; default `by_interface`.
        ropes: each layer's rotary table, of `calibrated_positions`, for a model that rotates by
            code of its own; default the model's.

    Raises:
        InvalidRequestError: there is too little text, no tokenizer, or packed weights that cannot
            be read.
    """
    if (reason := calibration_obstacle(loaded)) is not None:
        raise InvalidRequestError(reason)
    geometry, model = loaded.geometry, loaded.model
    device = model.device if device is None else device
    ids = [i for text in texts for i in loaded.tokenizer(text)["input_ids"]]
    accumulator = BasisAccumulator(geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
    if ropes is None:
        ropes = layer_ropes(model, calibrated_positions(geometry), device)
    moments = torch.zeros(
        2, geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.head_dim
    )
    recorder = Recorder(accumulator, ropes, geometry.windows, geometry.softcap, moments.double())
    run = by_interface(model) if forward is None else forward
    chosen = list(text_spans(ids, max_spans, max_length=geometry.max_position_embeddings))
    bar = tqdm(chosen, desc=f"calibrate {loaded.name}", disable=None if progress else True)
    packed = next(packed_layers(model), None) is not None
    elsewhere = device != model.device or (device.type == "cpu" and not packed)
    with weight_copies(model, device) if elsewhere else nullcontext():
        for window in bar:
            run(torch.tensor([window], device=device), recorder)
    basis = accumulator.finish(
        q_pre=torch.stack(list(map(averaged_over_distances, recorder.moments[0], ropes))),
        q_post=recorder.moments[1],
        o=output_moment(model, geometry.num_kv_heads, geometry.head_dim),
        model_fingerprint=model_fingerprint(model),
    )
    done = {
        "event": "calibrated",
        "model": loaded.name,
        "model_fingerprint": basis.model_fingerprint,
        "num_tokens": basis.num_tokens,
        "num_spans": len(chosen),
    }
    logger.info("calibrated %s on %d tokens", loaded.name, basis.num_tokens, extra=done)
    return basis


def builtin_calibration(loaded: LoadedModel, **how: Any) -> SharedBasis:
    """Return the model's calibration on the package's text, made once and kept in a cache folder.

    It is kept by what the model and its tokenizer are, so all dtypes share it. If the folder cannot
    be written, the calibration is used, and the next start makes it again.

    Args:
        how: `device`, `forward` and `ropes` of `calibrate`.

    Raises:
        InvalidRequestError: as `calibrate`.
    """
    text, fingerprint = builtin_text(), fingerprint_of(loaded)
    ids = [] if loaded.tokenizer is None else loaded.tokenizer(text)["input_ids"]
    content = f"{BASIS_VERSION}/{fingerprint}/{ids}"
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    path = cache_folder() / CALIBRATIONS / f"{key}.safetensors"
    if os.path.isfile(path):  # False, and no error, if the folder cannot be read
        try:
            return SharedBasis.load(path, model_fingerprint=fingerprint)
        except (CorruptFileError, FormatError) as error:
            logger.warning("making a damaged calibration again: %s", error)
    start = {"event": "calibration", "model": loaded.name, "reason": "no kept calibration"}
    logger.info("calibrating %s on the built-in text (once)", loaded.name, extra=start)
    basis = calibrate(loaded, [text], max_spans=DEFAULT_SPANS, progress=True, **how)
    _keep(basis, path)
    return basis


def _keep(basis: SharedBasis, path: Path) -> None:
    try:
        basis.save(path)
    except OSError as error:
        logger.warning(
            "the calibration cannot be kept, so the next start makes it again: %s. "
            "SPECTRAL_PAGED_CACHE names a folder that can be written",
            error,
        )


def find_calibration(
    given: SharedBasis | str | Path | None, format: PageFormat, loaded: LoadedModel, **how: Any
) -> SharedBasis | Literal["online"] | None:
    """Resolve `LLM(calibration=given)`: a calibration, `online`, or None.

    None: `format` needs no calibration, or none is given.

    Args:
        how: `device`, `forward` and `ropes` of `calibrate`, for `auto`.

    Raises:
        FormatError: the calibration was made from another model.
        CorruptFileError: the file is damaged.
        InvalidRequestError: there is no such file, or `auto` was given and the model cannot be
            calibrated.
    """
    if not format.needs_calibration or given is None:
        return None
    if isinstance(given, SharedBasis):
        fingerprint = fingerprint_of(loaded)
        if given.model_fingerprint != fingerprint:
            raise FormatError(
                f"the calibration was made on a model with fingerprint {given.model_fingerprint}; "
                f"this one has {fingerprint}: run `spectral-paged calibrate` on the model that "
                "will use it"
            )
        return given
    if given == "auto":
        return builtin_calibration(loaded, **how)
    if given == "online":
        return "online"
    path = calibration_file(given)
    assert path is not None, "auto and online are no files"
    return SharedBasis.load(path, model_fingerprint=fingerprint_of(loaded))


def calibration_file(given: str | Path) -> Path | None:
    """Return the path of `LLM(calibration=given)`; None for `auto` and `online`.

    Raises:
        InvalidRequestError: there is no such file.
    """
    if given in ("auto", "online"):
        return None
    path = Path(given)
    if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        raise InvalidRequestError(
            f"there is no calibration file {shown(str(path))}: make it with `spectral-paged "
            "calibrate`, or use calibration='auto'"
        )
    return path
