"""The codec encodes blocks into pages (decompose, quantize, write) and decodes them.

Encoding is pure: a page's bytes depend on the block's own K and V (and given weights of its
tokens), on the format and on the calibration it is bound to, never on other blocks of the batch.
Everything runs in fp32 and is batched over blocks, layers and heads.

```
x        K or V of a block, page mean removed (page_mean.py), scaled near 1 by a power of two
y        x W                                            W: root of the calibrated metric, or 1
C, B     y ~= C (B W)                                   basis of the page, or shared
codes    C / gain / scale -> nearest levels             quantize.py
```
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.errors import FormatError, NonFiniteError
from spectral_paged.kernels.ops import page_ops
from spectral_paged.kernels.page.bit_packing import pack
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, GAIN_SKIPPED, LEVEL_UNIT
from spectral_paged.kernels.page.view import (
    SideView,
    code_values,
    rebuild_side,
    side_view,
    slot_tokens,
)
from spectral_paged.pages.decompose import band_vectors, decompose
from spectral_paged.pages.format import PageFormat
from spectral_paged.pages.page_mean import mean_of, ordinary_tokens
from spectral_paged.pages.quantize import INT8_MAX, Quantized, encode_values, quantize
from spectral_paged.pages.sections import Bands
from spectral_paged.pages.shared_basis import BoundBasis, SideRows

# CUDA libraries choose algorithms by batch size, and algorithms round differently. Pages are
# therefore encoded in batches of one size there, the last padded with zeros (decision 0009).
CUDA_BATCH = 32
FP16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class _Projected:
    """K or V of a batch, projected and ready to be quantized; N' = pages x heads."""

    x: Tensor  # fp32 [N', 512, D], mean included
    coeff: Tensor  # fp32 [N', 512, rank]
    unit: Tensor  # fp32 [N', rank], factor of a stored scale
    mean: Tensor | None  # fp16 [N', D]
    rows: list[Tensor]  # uint8 [N', count, D] a band: the page's own basis codes


def _project(
    x: Tensor,
    format: PageFormat,
    bands: Bands,
    token_weights: Tensor | None,
    rows: SideRows | None,
) -> _Projected:
    """Project `x` fp32 `[N', 512, D]` on its basis; `rows` are the calibration's for each of N'."""
    given, mean = x, None
    ordinary = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if format.outlier_slots:
        ordinary = ordinary_tokens(x)
    if format.mean:
        # The part of the mean that fp16 cannot hold stays in the residual, which the basis fits.
        mean = mean_of(x, ordinary).clamp(-FP16_MAX, FP16_MAX).half()
        x = x - mean.float().unsqueeze(-2)
    # A power of two per head scales the values near 1, exactly, so that squares of any finite block
    # fit (decision 0006).
    _, exponent = torch.frexp(x.abs().amax(dim=(-2, -1), keepdim=True))
    power = torch.exp2(exponent.clamp(-100, 100).float())
    y = x / power
    weighted = rows is not None and format.dim_weighting != "none"
    if rows is not None and weighted:
        y = y @ rows.weight
    if format.basis == "shared":
        assert rows is not None
        coeff = y @ rows.vectors.transpose(-1, -2)
        unit = (1 / power).squeeze(-1).expand_as(coeff[:, 0])
        return _Projected(given, coeff, unit, mean, [])
    # loud tokens are left out as those of the slots are from scales, or they take rows of the basis
    target = y.masked_fill(~ordinary.unsqueeze(-1), 0.0)
    if token_weights is not None:
        target = target * token_weights.sqrt().unsqueeze(-1)
    eigenvectors = page_ops(x.device).eigenvectors
    vectors = decompose(target, sum(count for count, _ in bands), format, eigenvectors)
    vectors = band_vectors(vectors, bands, format)
    if rows is not None and weighted:
        vectors = vectors @ rows.inverse
    codes, rounded, row_scale = _round_rows(vectors, format, bands)
    if rows is not None and weighted:
        rounded = rounded @ rows.weight
    coeff = _fitted(rounded, y)
    return _Projected(given, coeff, 1 / (power.squeeze(-1) * row_scale), mean, codes)


def _fitted(rows: Tensor, y: Tensor) -> Tensor:
    """Coefficients `[N', 512, rank]` of `y` `[N', 512, D]` over `rows` `[N', rank, D]`.

    The fit is by least squares, because rounded rows are not quite orthonormal (decision 0005).
    They are near enough to it that their products are positive definite, and a Cholesky factor
    costs a CUDA host a fifth of an LU factor.
    """
    factor = torch.linalg.cholesky(rows @ rows.transpose(-1, -2))
    half = torch.linalg.solve_triangular(factor, rows @ y.transpose(-1, -2), upper=False)
    whole = torch.linalg.solve_triangular(factor.transpose(-1, -2), half, upper=True)
    return whole.transpose(-1, -2)


def _round_rows(
    vectors: Tensor, format: PageFormat, bands: Bands
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Basis codes by band, the rows that the codes represent, and row scales `[N', rank]`."""
    codes, rows, scales, first = [], [], [], 0
    for count, bits in bands:
        part = vectors[:, first : first + count]
        row_bits = 8 if bits == 8 else format.basis_bits
        if row_bits == 8:
            scale = part.abs().amax(dim=-1, keepdim=True) / INT8_MAX
        else:
            scale = part.square().mean(dim=-1, keepdim=True).sqrt() / LEVEL_UNIT[4]
        scale = scale.clamp_min(1e-20)
        codes.append(encode_values(part / scale, row_bits, "gaussian"))
        rows.append(code_values(codes[-1], row_bits, "gaussian") * scale)
        scales.append(scale.squeeze(-1))
        first += count
    return codes, torch.cat(rows, dim=-2), torch.cat(scales, dim=-1)


# ---- outliers ----------------------------------------------------------------------------


def _choose_slots(sides: list[tuple[_Projected, Quantized]], num_slots: int) -> Tensor:
    """The outlier tokens `[N', num_slots]`, ascending: those with the largest coefficient errors.

    A token's error counts relative to the mean error of its side. The error outside the basis does
    not count, because choosing by it was measured to be worse.
    """
    total: Tensor | float = 0.0
    for projected, quantized in sides:
        error = (projected.coeff - quantized.values).square().sum(-1)
        total = total + error / error.mean(dim=-1, keepdim=True).clamp_min(1e-30)
    assert isinstance(total, Tensor)
    return total.topk(num_slots, dim=-1).indices.sort(dim=-1).values


def _without(projected: _Projected, tokens: Tensor) -> Tensor:
    """Coefficients with 0 for the outlier `tokens` `[N', slots]`, whose codes nothing reads."""
    index = tokens.unsqueeze(-1).expand(-1, -1, projected.coeff.shape[-1])
    return projected.coeff.scatter(-2, index, 0.0)


# ---- pages -------------------------------------------------------------------------------


def _write_side(view: SideView, projected: _Projected, quantized: Quantized, heads: int) -> None:
    def by_page(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, heads))

    for i, band in enumerate(view.bands):
        band.write(by_page(quantized.codes[i]))
        if band.basis is not None:
            band.basis.copy_(by_page(pack(projected.rows[i], band.layout.basis_bits)[0]))
    view.scale.copy_(by_page(quantized.scale))
    if view.gain is not None and quantized.gain is not None:
        view.gain.copy_(by_page(quantized.gain))
    if view.mean is not None and projected.mean is not None:
        view.mean.copy_(by_page(projected.mean))


def _write_slots(view: SideView, x: Tensor, tokens: Tensor, heads: int) -> None:
    assert view.slots is not None
    exact = x.gather(-2, tokens.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    view.slots.copy_(exact.clamp(-FP16_MAX, FP16_MAX).half().unflatten(0, (-1, heads)))


def encode_pages(
    k: Tensor,
    v: Tensor,
    format: PageFormat,
    *,
    basis: BoundBasis | None = None,
    layers: Sequence[int] | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Encode `N` blocks of one or many layers into pages.

    Args:
        k, v: `[N, H, 512, D]`, any float dtype; keys as the format stores them
            (turned back by `kernels.math.rotary.stored_keys`).
        basis: the result of `SharedBasis.bind(format)`, for formats that need a calibration.
        layers: the layer of each of the N blocks, to find its rows in `basis`.
        token_weights: `[N, H, 512]`, not negative: weights of the tokens' squared errors in the
            decomposition of a page's own basis; None weighs all alike.

    Returns:
        uint8 `[N, page_bytes]`.

    Raises:
        NonFiniteError: NaN or Inf in a block or its weights; `block_index` names the block.
        FormatError: wrong shape, weights for a basis that pages share, or a format that needs a
            calibration without its basis.
    """
    num_pages, dim = k.shape[0], format.head_dim
    want = [num_pages, format.num_kv_heads, BLOCK_TOKENS, dim]
    if list(k.shape) != want:
        raise FormatError(f"blocks are {list(k.shape)}; format {format.name!r} takes {want}")
    if v.shape != k.shape:
        raise FormatError(f"k is {list(k.shape)} but v is {list(v.shape)}")
    # sums over other strides round differently, and equal blocks must give equal bytes
    k, v = k.float().contiguous(), v.float().contiguous()
    check_finite(K=k, V=v)
    if token_weights is not None:
        _check_token_weights(token_weights, format, want[:3])
    inputs = [k, v, token_weights, _layer_rows(format, basis, layers, num_pages, k.device)]
    if not k.is_cuda:
        return _encode_batch(inputs, format, basis)
    pages = [
        _encode_batch([_padded(x, start) for x in inputs], format, basis)
        for start in range(0, num_pages, CUDA_BATCH)
    ]
    return torch.cat(pages)[:num_pages] if pages else k.new_empty(0, format.page_bytes).byte()


def _check_token_weights(weights: Tensor, format: PageFormat, want: list[int]) -> None:
    if format.basis == "shared":
        raise FormatError(
            f"token_weights weigh the decomposition of a page's own basis; format {format.name!r} "
            "shares one: pass none"
        )
    if list(weights.shape) != want:
        raise FormatError(f"token_weights are {list(weights.shape)}; these blocks take {want}")
    check_finite(token_weights=weights)
    if bool((weights < 0).any()):
        raise FormatError("token_weights are negative somewhere; give 0 or more")


def _layer_rows(
    format: PageFormat,
    basis: BoundBasis | None,
    layers: Sequence[int] | None,
    num_pages: int,
    device: torch.device,
) -> Tensor | None:
    """The layer of each block, int64 `[N]`; None where the format needs no calibration."""
    if not format.needs_calibration:
        return None
    if basis is None or layers is None or len(layers) != num_pages:
        raise FormatError(
            f"format {format.name!r} needs a calibration: pass basis=SharedBasis.bind(format) and "
            f"the layer of each of the {num_pages} blocks"
        )
    return torch.tensor(list(layers), dtype=torch.long, device=device)


def _padded(x: Tensor | None, start: int) -> Tensor | None:
    """`CUDA_BATCH` blocks from `start`, zeros past the end."""
    if x is None:
        return None
    part = x[start : start + CUDA_BATCH]
    missing = CUDA_BATCH - len(part)
    return torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) if missing else part


def _encode_batch(
    inputs: list[Tensor | None], format: PageFormat, basis: BoundBasis | None
) -> Tensor:
    """Pages of checked inputs k, v, token_weights, layers."""
    k, v, token_weights, layers = inputs
    assert k is not None and v is not None
    heads = format.num_kv_heads
    if token_weights is not None:
        token_weights = token_weights.float().flatten(0, 1)
    pages = torch.zeros(len(k), format.page_bytes, dtype=torch.uint8, device=k.device)
    sides = []
    for x, side, bands in ((k, "k", format.k_bands), (v, "v", format.v_bands)):
        rows = None
        if basis is not None and layers is not None:
            rows = basis.side(side).of_layers(layers)
        projected = _project(x.flatten(0, 1), format, bands, token_weights, rows)
        sides.append((projected, quantize(projected.coeff, bands, format, projected.unit)))
    if format.outlier_slots:
        tokens = _choose_slots(sides, format.outlier_slots)
        slot_tokens(pages, format.layout).copy_(tokens.to(torch.int16).unflatten(0, (-1, heads)))
        sides = [
            (p, quantize(_without(p, tokens), bands, format, p.unit))
            for (p, _), bands in zip(sides, (format.k_bands, format.v_bands), strict=True)
        ]
        for _, quantized in sides:
            if quantized.gain is not None:
                quantized.gain.scatter_(-1, tokens, GAIN_SKIPPED)
    for (projected, quantized), side in zip(sides, "kv", strict=True):
        view = side_view(pages, format.layout, side)
        _write_side(view, projected, quantized, heads)
        if format.outlier_slots:
            _write_slots(view, projected.x, tokens, heads)
    return pages


def check_finite(**sides: Tensor) -> None:
    """Raise NonFiniteError for NaN or Inf in blocks `[N, H, ...]`, naming side, block and head."""
    for side, x in sides.items():
        bad = ~torch.isfinite(x).flatten(2).all(dim=-1)  # [N, H]
        if bool(bad.any()):
            block, head = bad.nonzero()[0].tolist()
            raise NonFiniteError(
                f"{side} has NaN or Inf in block {block}, head {head}: the model produced it "
                "before sealing; check the model's dtype (fp16 overflow) and its weights",
                block_index=block,
            )


def decode_pages(
    pages: Tensor,
    format: PageFormat,
    *,
    basis: BoundBasis | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """K and V of pages uint8 `[N, page_bytes]`, fp32 `[N, H, 512, D]`, keys as stored.

    Args: `basis` and `layers` as in `encode_pages`.
    """
    index = _layer_rows(format, basis, layers, len(pages), pages.device)
    sides = []
    for side in "kv":
        shared = None
        if index is not None and basis is not None and format.basis == "shared":
            shared = basis.side(side).rows[index]
        sides.append(rebuild_side(pages, format.layout, side, shared))
    return sides[0], sides[1]
