"""The decompositions that give a block's tokens a basis of few strong components."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spectral_paged.pages.format import PageFormat
from spectral_paged.pages.sections import Bands

OVERSAMPLING = 16
POWER_ITERATIONS = 3

Eigenvectors = Callable[[Tensor], Tensor]  # `kernels.seal.eigenvectors`, or its GPU kernel


def gram_basis(x: Tensor, rank: int, eigenvectors: Eigenvectors) -> Tensor:
    """Leading right singular vectors of `x` `[N, T, D]` from its Gram matrix: `[N, rank, D]`.

    The eigenvectors of X^T X are X's right singular vectors. Squaring costs precision only in
    components far below the ones kept. Any float dtype in, fp32 inside and out.
    """
    x = x.float()
    return leading_eigenvectors(x.transpose(-1, -2) @ x, rank, eigenvectors)


def leading_eigenvectors(gram: Tensor, rank: int, eigenvectors: Eigenvectors) -> Tensor:
    """Eigenvectors of symmetric `gram` `[..., D, D]` as rows, strongest first: `[..., rank, D]`."""
    vectors = eigenvectors(gram.reshape(-1, *gram.shape[-2:]))
    return vectors.reshape(gram.shape)[..., :rank, :].contiguous()


def randomized_basis(x: Tensor, rank: int, *, seed: int) -> Tensor:
    """Leading right singular vectors of `x` `[N, T, D]` by randomized SVD: `[N, rank, D]`, fp32.

    Halko, Martinsson, Tropp 2011, algorithm 4.4: Gaussian sketch with oversampling and power
    iterations, re-orthogonalised each time. The sketch depends on `seed` only.
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


def fix_signs(basis: Tensor) -> Tensor:
    """`basis` with each vector's largest entry positive, so that all solvers give equal bytes."""
    peak = basis.gather(-1, basis.abs().argmax(dim=-1, keepdim=True))
    return basis * torch.where(peak < 0, -1.0, 1.0)


def decompose(x: Tensor, rank: int, format: PageFormat, eigenvectors: Eigenvectors) -> Tensor:
    """Orthonormal basis `[N, rank, D]` of `x` `[N, T, D]` by the format's decomposition."""
    if format.decomposition == "gram":
        return fix_signs(gram_basis(x, rank, eigenvectors))
    return fix_signs(randomized_basis(x, rank, seed=int(format.fingerprint[:8], 16)))


def orthogonal_mixer(size: int) -> Tensor:
    """An orthogonal matrix with entries of similar size, fp32 `[size, size]`.

    It is Sylvester's Hadamard matrix where `size` is a power of two, else the cosine transform
    DCT-II. Every output mixes every input, so variances even out and tails become Gaussian.
    """
    if size & (size - 1) == 0:
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
        return matrix / math.sqrt(size)
    k = torch.arange(size, dtype=torch.float64).unsqueeze(-1)
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def rotate_bands(vectors: Tensor, bands: Bands) -> Tensor:
    """`vectors` `[..., rank, D]` with the rows of each band below 8 bits mixed among themselves."""
    parts, first = [], 0
    for count, bits in bands:
        part = vectors[..., first : first + count, :]
        parts.append(part if bits == 8 else orthogonal_mixer(count).to(part) @ part)
        first += count
    return torch.cat(parts, dim=-2)


def band_vectors(vectors: Tensor, bands: Bands, format: PageFormat) -> Tensor:
    """`vectors` `[..., rank, D]`, mixed inside low bands if the format has `band_rotation`."""
    return rotate_bands(vectors, bands) if format.band_rotation else vectors
