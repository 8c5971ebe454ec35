"""Eigenvectors of many small symmetric matrices, in Triton: one program a matrix.

One-sided Jacobi (Hestenes 1958) on the Cholesky factor (Veselic and Hari 1989): for G = R^T R,
pairs of rows of R are rotated until all rows are orthogonal. They then are eigenvectors of G, whose
lengths are the roots of their eigenvalues, so that no rotations are accumulated beside them. The
pairs of a turn touch each row once. D - 1 turns are a sweep, in which all rows meet (Brent and Luk
1985, the order of a round-robin tournament):

```
turn 0   0 1 2 3     turn 1   0 2 3 4     place 0 stays, the others move on by one a turn;
         7 6 5 4              1 7 6 5     rows above each other are rotated
```

Rows stay in memory (64 KiB for D = 128, which L1 keeps) and change places by address. Small rows
become as orthogonal as large ones, because a rotation rounds relative to the row that it makes.
torch's `eigh` takes 1.3 ms a matrix, one after the other; this kernel takes 8 ms for 512 (an H100).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.page.triton import padded

SWEEPS = 16  # at most: 9 to 12 are enough
SMALL = 2e-6  # two rows of a smaller cosine are not rotated
# No sweep follows one whose cosines are at most this: it leaves smaller ones, mostly their squares.
LAST = 1e-4
# Share of the trace that is added to each eigenvalue. It changes no eigenvector, and gives a matrix
# that only rounding keeps from being semidefinite a factor whose rows are not zero.
RIDGE = 1e-5
PAIRS = 32  # pairs of a turn that are in registers at a time


@triton.jit
def _jacobi_kernel(
    rows_ptr,
    sweeps,
    last,
    small,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
):
    base = rows_ptr + tl.program_id(0).to(tl.int64) * DIM * DIM
    dim = tl.arange(0, DIM_PAD)
    inside = dim < DIM
    sweep = 0
    found = 1.0
    while (sweep < sweeps) & (found > last):
        worst = tl.zeros((PAIRS,), tl.float32)
        for turn in range(DIM - 1):
            for first in tl.static_range(0, DIM // 2, PAIRS):
                pair = first + tl.arange(0, PAIRS)
                known = pair < DIM // 2
                upper = tl.where(pair == 0, 0, 1 + (pair + DIM - 2 + turn) % (DIM - 1))
                lower = 1 + (DIM - 2 - pair + turn) % (DIM - 1)
                mask = known[:, None] & inside[None, :]
                upper_ptr = base + upper[:, None] * DIM + dim[None, :]
                lower_ptr = base + lower[:, None] * DIM + dim[None, :]
                x = tl.load(upper_ptr, mask=mask, other=0.0)
                y = tl.load(lower_ptr, mask=mask, other=0.0)
                xx, yy, xy = tl.sum(x * x, 1), tl.sum(y * y, 1), tl.sum(x * y, 1)
                cosine = tl.abs(xy) / tl.sqrt(tl.maximum(xx * yy, 1e-37))
                worst = tl.maximum(worst, cosine)
                turned = cosine > small
                # the smaller root of t^2 + 2 zeta t - 1, which makes x and y orthogonal
                zeta = (yy - xx) / tl.where(turned, 2.0 * xy, 1.0)
                tangent = 1.0 / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
                tangent = tl.where(zeta < 0, -tangent, tangent)
                tangent = tl.where(turned, tangent, 0.0)
                c = 1.0 / tl.sqrt(1.0 + tangent * tangent)
                s = c * tangent
                tl.store(upper_ptr, c[:, None] * x - s[:, None] * y, mask=mask)
                tl.store(lower_ptr, s[:, None] * x + c[:, None] * y, mask=mask)
            tl.debug_barrier()  # the next turn reads rows that other threads have written
        found = tl.max(worst, 0)
        sweep += 1


def eigenvectors(matrices: Tensor) -> Tensor:
    """`seal.eigenvectors.eigenvectors` in Triton: the same arguments and results, as far as fp32
    tells eigenvalues apart.

    `matrices` must be fp32, finite and of even D; this is not checked. The result for a matrix does
    not depend on the others, but on their number, by which torch chooses its Cholesky
    factorization.
    """
    dim = matrices.shape[-1]
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    scaled = torch.where(trace > 0, matrices / trace, 0.0)
    scaled.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    rows = torch.linalg.cholesky_ex(scaled, upper=True).L.contiguous()
    pairs = min(PAIRS, padded(dim // 2, 1))
    _jacobi_kernel[(len(rows),)](
        rows, SWEEPS, LAST, SMALL, DIM=dim, DIM_PAD=padded(dim, 1), PAIRS=pairs, num_warps=8
    )
    length = rows.norm(dim=-1)
    order = length.argsort(dim=-1, descending=True, stable=True)
    rows = rows / length.unsqueeze(-1)
    return rows.gather(-2, order.unsqueeze(-1).expand_as(rows))
