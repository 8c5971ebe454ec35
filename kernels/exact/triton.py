"""Writing of new keys and values into exact pages, and copying of them, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.exact.reference import ExactPlaces
from spectral_paged.kernels.launch.configs import dependent_launch
from spectral_paged.kernels.page.layout import UNIT_BYTES
from spectral_paged.kernels.page.triton import after_previous, padded


# One build serves every step. Places are read one by one, so their alignment gains nothing. Strides
# are in heads, because that of a single token may be any number, whose alignment would count.
@triton.jit(
    do_not_specialize=["k_heads", "v_heads"],
    do_not_specialize_on_alignment=["units_ptr", "offsets_ptr"],
)
def _append_kernel(
    k_ptr,
    v_ptr,
    plane_ptr,
    units_ptr,
    offsets_ptr,
    k_heads,
    v_heads,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, DIM_PAD)
    ok = dim < DIM
    unit = tl.load(units_ptr + token).to(tl.int64)
    if unit >= 0:
        page = unit * UNIT + head * (128 * DIM)
        to = plane_ptr + page + tl.load(offsets_ptr + token) * DIM + dim
        k = tl.load(k_ptr + (token * k_heads + head) * DIM + dim, mask=ok)
        v = tl.load(v_ptr + (token * v_heads + head) * DIM + dim, mask=ok)
        tl.store(to, k, mask=ok)
        tl.store(to + 64 * DIM, v, mask=ok)


@triton.jit(
    do_not_specialize=["head_stride"],
    do_not_specialize_on_alignment=["units_ptr", "rows_ptr", "counts_ptr"],
)
def _copy_kernel(
    plane_ptr,
    units_ptr,
    rows_ptr,
    counts_ptr,
    out_ptr,
    head_stride,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Copy K or V of one head of an exact page; `head_stride` is in rows of `out`."""
    page, head, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token, dim = tl.arange(0, 64)[:, None], tl.arange(0, DIM_PAD)[None, :]
    ok = (token < tl.load(counts_ptr + page)) & (dim < DIM)
    unit = tl.load(units_ptr + page).to(tl.int64)
    read = plane_ptr + unit * UNIT + (head * 2 + side) * (64 * DIM) + token * DIM + dim
    place = (side * tl.num_programs(1) + head).to(tl.int64) * head_stride
    row = place + tl.load(rows_ptr + page) + token
    tl.store(out_ptr + row * DIM + dim, tl.load(read, mask=ok), mask=ok)


def exact_copy(plane: Tensor, places: ExactPlaces, out: Tensor) -> None:
    """`exact.reference.exact_copy` in Triton: the same arguments; `out` is contiguous."""
    assert out.is_contiguous(), "rows lie behind each other"
    sides, num_heads, num_rows, dim = out.shape
    if len(places.units):
        _copy_kernel[(len(places.units), num_heads, sides)](
            plane.view(out.dtype),
            *places,
            out,
            num_rows,
            DIM=dim,
            DIM_PAD=padded(dim),
            UNIT=UNIT_BYTES // out.element_size(),
            num_warps=4,
        )


def exact_append(k: Tensor, v: Tensor, plane: Tensor, units: Tensor, offsets: Tensor) -> None:
    """`exact.reference.exact_append` in Triton: the same arguments.

    `k` and `v` may be slices of a wider tensor (a fused projection), with heads behind each other.
    """
    num_tokens, num_heads, dim = k.shape
    k, v = (
        x if x.stride()[1:] == (dim, 1) and x.stride(0) % dim == 0 else x.contiguous()
        for x in (k, v)
    )
    _append_kernel[(num_tokens, num_heads)](
        k,
        v,
        plane.view(k.dtype),
        units,
        offsets,
        k.stride(0) // dim,
        v.stride(0) // dim,
        DIM=dim,
        DIM_PAD=padded(dim),
        UNIT=UNIT_BYTES // k.element_size(),
        num_warps=1,
        **dependent_launch(k.device),
    )
