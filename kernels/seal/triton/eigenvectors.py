"""Eigenvectors of many small symmetric matrices, in Triton: a program each.

One-sided Jacobi (Hestenes 1958) on the Cholesky factor (Veselic and Hari 1989): of G = R^T R the
rows of R are rotated in pairs until each is orthogonal to each. They end up as eigenvectors of G,
as long as the roots of their eigenvalues, so nothing has to be accumulated beside them. Pairs of a
turn touch each row once; D - 1 turns make a sweep in which all rows meet (Brent and Luk 1985, the
order of a round-robin tournament):

```
turn 0   0 1 2 3     turn 1   0 2 3 4     place 0 stays, the others move on by one a turn;
         7 6 5 4              1 7 6 5     rows above each other are rotated
```

Rows stay in memory (a matrix of 128 takes 64 KiB, which L1 keeps) and change places by address.
Small rows become as orthogonal as large ones: a rotation rounds relative to the row that it makes.
torch's `eigh` takes 1.3 ms for each, one after the other; 512 at once take 8 ms here (an H100).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.page.triton import padded

SWEEPS = 16  # at most: 9 to 12 are enough
SMALL = 2e-6  # cosine of two rows that are left as they are
# The last sweep meets cosines of at most this and leaves smaller ones: as a rule their squares.
LAST = 1e-4
# Of the trace, added to each eigenvalue: it changes no eigenvector, and a matrix that is
# semidefinite but for its rounding has a factor with rows of some length.
RIDGE = 1e-5
PAIRS = 32  # of a turn, held in registers at a time


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
    """`kernels.eigenvectors.eigenvectors` in Triton: the same arguments and results, as far as
    fp32 tells eigenvalues apart. fp32, finite and of even D: nothing looks whether they are.

    What is found for a matrix does not depend on those beside it, if there are as many: torch
    chooses its Cholesky factorization by the number of matrices.
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
