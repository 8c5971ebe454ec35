"""Encode blocks into pages: decompose, quantize, write.

Encoding is pure: a page's bytes depend on the block's own K and V (and queries, where the format
asks for them) and on the format, never on what else is encoded beside it. Everything runs in
fp32 and is batched over blocks, layers and heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.errors import FormatError, NonFiniteError
from spectral_paged.kernels.layout import BLOCK_TOKENS, COEFF_OFFSET
from spectral_paged.kernels.page_view import rebuild_side, side_view
from spectral_paged.page_format import PageFormat

OVERSAMPLING = 16
POWER_ITERATIONS = 3
# CUDA libraries choose algorithms by batch size, and algorithms round differently: there, pages are
# encoded in batches of one size, the last filled up with zeros.
CUDA_BATCH = 32
INT8_MAX = 127
FP16_MAX = 65504.0


# ---- decomposition -----------------------------------------------------------------------


def gram_basis(x: Tensor, rank: int) -> Tensor:
    """Leading right singular vectors of `x` `[N, T, D]` from its Gram matrix: `[N, rank, D]`.

    The eigenvectors of X^T X are X's right singular vectors. Squaring costs precision only in
    components far below the ones kept. Any float dtype in, fp32 inside and out.
    """
    x = x.float()
    _, vectors = torch.linalg.eigh(x.transpose(-1, -2) @ x)  # ascending
    return vectors[..., -rank:].flip(-1).transpose(-1, -2).contiguous()


def randomized_basis(x: Tensor, rank: int, *, seed: int) -> Tensor:
    """Leading right singular vectors by randomized SVD: `[N, rank, D]`, fp32.

    Halko, Martinsson, Tropp 2011, algorithm 4.4: Gaussian sketch with oversampling and power
    iterations, re-orthogonalised each time. The sketch comes from `seed` alone.
    """
    x = x.float()
    dim = x.shape[-1]
    width = min(rank + OVERSAMPLING, dim)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(dim, width, generator=generator).to(x.device)
    q = torch.linalg.qr(x @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(x.transpose(-1, -2) @ q).Q
        q = torch.linalg.qr(x @ q).Q
    _, _, basis = torch.linalg.svd(q.transpose(-1, -2) @ x, full_matrices=False)
    return basis[..., :rank, :].contiguous()


def decompose(x: Tensor, rank: int, format: PageFormat) -> Tensor:
    """Orthonormal basis `[N, rank, D]` of `x` `[N, T, D]` by the format's decomposition."""
    if format.decomposition == "gram":
        basis = gram_basis(x, rank)
    else:
        basis = randomized_basis(x, rank, seed=int(format.fingerprint[:8], 16))
    # A vector's sign is free; fix it so that equal inputs give equal bytes on every solver.
    peak = basis.gather(-1, basis.abs().argmax(dim=-1, keepdim=True))
    return basis * torch.where(peak < 0, -1.0, 1.0)


# ---- weights -----------------------------------------------------------------------------


def attention_mass(queries: Tensor, keys: Tensor, *, scale: float) -> Tensor:
    """Token weights: the mass each token gets from the block's own last queries.

    Args:
        queries: `[N, G, Q, D]`, post-RoPE queries of the block's last Q tokens.
        keys: `[N, 512, D]`, post-RoPE.

    Returns:
        fp32 `[N, 512]`, mean 1, never below a tenth: a token that those queries ignore still
        matters to later ones.
    """
    scores = queries.float() @ keys.float().unsqueeze(1).transpose(-1, -2) * scale
    num_queries = queries.shape[-2]
    column = torch.arange(BLOCK_TOKENS, device=keys.device)
    row = torch.arange(BLOCK_TOKENS - num_queries, BLOCK_TOKENS, device=keys.device)
    scores = scores.masked_fill(column > row.unsqueeze(-1), float("-inf"))
    mass = torch.softmax(scores, dim=-1).mean(dim=(1, 2))
    mass = mass / mass.mean(dim=-1, keepdim=True)
    return 0.1 + 0.9 * mass


def query_energy(queries: Tensor, rotary_dim: int) -> Tensor:
    """Root mean square of the queries per RoPE pair: `[N, D]`, mean square 1.

    Both members of a pair share their energy, so the diagonal commutes with rotation.
    """
    energy = queries.float().square().mean(dim=(1, 2))  # [N, D]
    half = rotary_dim // 2
    pair = (energy[:, :half] + energy[:, half:rotary_dim]) / 2
    energy = torch.cat((pair, pair, energy[:, rotary_dim:]), dim=-1)
    energy = energy / energy.mean(dim=-1, keepdim=True).clamp_min(1e-20)
    return energy.sqrt().clamp_min(1e-2)


# ---- one side ----------------------------------------------------------------------------


def _encode_side(
    x: Tensor,
    pages: Tensor,
    format: PageFormat,
    side: str,
    *,
    token_weights: Tensor | None,
    dim_weights: Tensor | None,
) -> None:
    """Encode `x` fp32 `[N, H, 512, D]` into side `side` of `pages` uint8 `[N, page_bytes]`."""
    view = side_view(pages, format.layout, side)
    num_pages, num_heads, _, dim = x.shape
    if view.mean is not None:
        # what fp16 cannot hold stays in the residual, where the basis takes it
        mean = x.mean(dim=-2).clamp(-FP16_MAX, FP16_MAX).half()
        view.mean.copy_(mean)
        x = x - mean.float().unsqueeze(-2)
    flat = x.reshape(num_pages * num_heads, BLOCK_TOKENS, dim)
    # A power of two per head, exact, brings the values near 1: squares of any finite block fit.
    _, exponent = torch.frexp(flat.abs().amax(dim=(-2, -1), keepdim=True))
    power = torch.exp2(exponent.clamp(-100, 100).float())
    flat = flat / power
    rank = view.scale.shape[-1]
    weighted = flat if dim_weights is None else flat * dim_weights.unsqueeze(-2)
    target = weighted if token_weights is None else weighted * token_weights.sqrt().unsqueeze(-1)
    basis = decompose(target, rank, format)
    if dim_weights is not None:
        basis = basis / dim_weights.unsqueeze(-2)
    basis_scale = basis.abs().amax(dim=-1, keepdim=True).clamp_min(1e-20) / INT8_MAX
    basis_codes = (basis / basis_scale).round()
    # Coefficients are fitted to the rounded basis (least squares), which absorbs its error.
    rounded = basis_codes * basis_scale
    if dim_weights is not None:
        rounded = rounded * dim_weights.unsqueeze(-2)
    gram = rounded @ rounded.transpose(-1, -2)
    coeff = torch.linalg.solve(gram, rounded @ weighted.transpose(-1, -2)).transpose(-1, -2)
    coeff_scale = coeff.abs().amax(dim=-2, keepdim=True) / INT8_MAX
    safe_scale = torch.where(coeff_scale == 0, torch.ones_like(coeff_scale), coeff_scale)
    coeff_codes = (coeff / safe_scale).round()

    shape = (num_pages, num_heads)
    view.coeff.copy_((coeff_codes + COEFF_OFFSET).to(torch.uint8).unflatten(0, shape))
    view.basis.copy_((basis_codes + COEFF_OFFSET).to(torch.uint8).unflatten(0, shape))
    scale = coeff_scale.squeeze(-2) * basis_scale.squeeze(-1) * power.squeeze(-1)
    view.scale.copy_(scale.unflatten(0, shape))


# ---- pages -------------------------------------------------------------------------------


def encode_pages(
    k: Tensor,
    v: Tensor,
    format: PageFormat,
    *,
    queries: Tensor | None = None,
    rotary_dim: int | None = None,
    scale: float | None = None,
    rotated_k: Tensor | None = None,
) -> Tensor:
    """Encode `N` blocks of one or many layers into pages.

    Args:
        k, v: `[N, H, 512, D]`, any float dtype; keys as the format stores them
            (un-rotated for `rope="pre"`).
        queries: `[N, H, G, Q, D]`, post-RoPE queries of each block's last tokens; needed by
            formats with token or dimension weighting, ignored by others.
        rotary_dim: rotated width of a head, for the query-energy pairs; default D.
        scale: softmax scale, for attention mass; default D ** -0.5.
        rotated_k: post-RoPE keys `[N, H, 512, D]`, for attention mass; default `k`.

    Returns:
        uint8 `[N, page_bytes]`.

    Raises:
        NonFiniteError: NaN or Inf in a block; `block_index` and the message say where.
        FormatError: wrong shape, or a weighted format without queries.
    """
    num_pages, dim = k.shape[0], format.head_dim
    want = [num_pages, format.num_kv_heads, BLOCK_TOKENS, dim]
    if list(k.shape) != want:
        raise FormatError(f"blocks are {list(k.shape)}; format {format.name!r} takes {want}")
    if v.shape != k.shape:
        raise FormatError(f"k is {list(k.shape)} but v is {list(v.shape)}")
    # one memory layout: sums over other strides round differently, and bytes must not
    k, v = k.float().contiguous(), v.float().contiguous()
    check_finite(K=k, V=v)
    if format.needs_queries:
        if queries is None:
            raise FormatError(f"format {format.name!r} weighs by queries; pass the block's queries")
        if queries.dim() != 5 or [*queries.shape[:2], queries.shape[-1]] != [*want[:2], dim]:
            raise FormatError(
                f"queries are {list(queries.shape)}; blocks of {want} take "
                f"[{num_pages}, {format.num_kv_heads}, G, Q, {dim}]"
            )
        check_finite(queries=queries)
    inputs = [k, v, queries if format.needs_queries else None, rotated_k]
    options = (format, rotary_dim or dim, dim**-0.5 if scale is None else scale)
    if not k.is_cuda:
        return _encode_batch(inputs, *options)
    pages = [
        _encode_batch([_padded(x, start) for x in inputs], *options)
        for start in range(0, num_pages, CUDA_BATCH)
    ]
    return torch.cat(pages)[:num_pages] if pages else _encode_batch(inputs, *options)


def _padded(x: Tensor | None, start: int) -> Tensor | None:
    """`CUDA_BATCH` blocks from `start`, zeros past the end."""
    if x is None:
        return None
    part = x[start : start + CUDA_BATCH]
    missing = CUDA_BATCH - len(part)
    return torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) if missing else part


def _encode_batch(
    inputs: list[Tensor | None], format: PageFormat, rotary_dim: int, scale: float
) -> Tensor:
    """Pages of checked inputs k, v, queries, rotated_k."""
    k, v, queries, rotated_k = inputs
    assert k is not None and v is not None
    token_weights = dim_weights = None
    if queries is not None:
        flat_queries = queries.flatten(0, 1)
        if format.token_weighting == "attention":
            seen_keys = (k if rotated_k is None else rotated_k).flatten(0, 1)
            token_weights = attention_mass(flat_queries, seen_keys, scale=scale)
        if format.dim_weighting == "query-energy":
            dim_weights = query_energy(flat_queries, rotary_dim)
    pages = torch.zeros(len(k), format.page_bytes, dtype=torch.uint8, device=k.device)
    _encode_side(
        k, pages, format, "k", token_weights=token_weights, dim_weights=dim_weights
    )
    _encode_side(v, pages, format, "v", token_weights=token_weights, dim_weights=None)
    return pages


def check_finite(**sides: Tensor) -> None:
    """Refuse NaN and Inf in blocks `[N, H, ...]`, naming side, block and head."""
    for side, x in sides.items():
        bad = ~torch.isfinite(x).flatten(2).all(dim=-1)  # [N, H]
        if bool(bad.any()):
            block, head = bad.nonzero()[0].tolist()
            raise NonFiniteError(
                f"{side} has NaN or Inf in block {block}, head {head}: the model produced it "
                "before sealing; check the model's dtype (fp16 overflow) and its weights",
                block_index=block,
            )


def decode_pages(pages: Tensor, format: PageFormat) -> tuple[Tensor, Tensor]:
    """K and V of pages uint8 `[N, page_bytes]`, fp32 `[N, H, 512, D]`, keys as stored."""
    layout = format.layout
    return rebuild_side(pages, layout, "k"), rebuild_side(pages, layout, "v")
