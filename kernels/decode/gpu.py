"""`decode_attention` on a GPU: items over exact pages and items over pages are merged at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from spectral_paged.kernels.decode.pages_gpu import attend_pages, plan_pages
from spectral_paged.kernels.decode.parts import Beside, Partials, ScoreOptions
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.decode.triton.exact import attend_exact, plan_exact
from spectral_paged.kernels.decode.triton.finish import finish, merge_items
from spectral_paged.kernels.launch.configs import DecodeConfig, decode_config
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import check_layout


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _begin(
    attend: Callable[[], Partials], device: torch.device, second_stream: bool
) -> Callable[[], Partials]:
    """Queue `attend`; what is returned gives its result to what is queued later.

    Memory of the second stream is used there alone until the join, and again only behind the next
    fork, which waits for what the first has queued: nothing is overwritten while it is read.
    """
    if not second_stream:
        found = attend()
        return lambda: found
    current, second = torch.cuda.current_stream(device), _second_stream(device)
    second.wait_stream(current)
    with torch.cuda.stream(second):
        beside = attend()

    def join() -> Partials:
        current.wait_stream(second)
        return beside

    return join


def decode_attention(
    q: Tensor,
    plane: Tensor,
    exact_table: Tensor,
    num_tokens: Tensor,
    page_table: Tensor | None,
    num_pages: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    dtype: torch.dtype,
    layout: PageLayout | None,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    k_basis: Tensor | None = None,
    v_basis: Tensor | None = None,
    softcap: float | None = None,
    first_exact: Tensor | None = None,
    first_visible: Tensor | None = None,
    exact_plan: DecodePlan | None = None,
    page_plan: DecodePlan | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """`kernels.decode_attention.decode_attention` on a GPU: the same arguments and results.

    Args:
        exact_plan, page_plan: `plan_exact` and `plan_pages` of this step, the same for all layers;
            made here where they are missing.
        config: how kernels are launched; default what `launch_configs` has for the GPU.

    Raises:
        ValueError: a layout that no kernel reads; the message says what to use instead.
    """
    if exact_plan is None:
        exact_plan = plan_exact(
            num_tokens, exact_table.shape[0] * exact_table.shape[1], num_kv_heads
        )

    def attend() -> Partials:
        return attend_exact(
            q,
            plane,
            exact_table,
            num_tokens,
            num_kv_heads=num_kv_heads,
            scale=scale,
            dtype=dtype,
            plan=exact_plan,
            options=ScoreOptions(0, softcap, first_exact),
        )

    if page_table is None or layout is None:
        return merge_items(q, attend(), exact_plan.first_item, dtype=q.dtype)[0]
    check_layout(layout)
    if config is None:
        config = decode_config(layout, q.device)
    if page_plan is None:
        page_plan = plan_pages(layout, num_pages, page_table.shape[0] * page_table.shape[1], config)
    join = _begin(attend, q.device, config.second_stream)
    pages = attend_pages(
        q,
        plane,
        page_table,
        layout=layout,
        cos=cos,
        sin=sin,
        scale=scale,
        k_basis=k_basis,
        plan=page_plan,
        config=config,
        options=ScoreOptions(first_position, softcap, first_visible),
    )
    beside = Beside(join(), exact_plan.first_item)
    out, _ = finish(
        q, pages, layout=layout, basis=v_basis, plan=page_plan, beside=beside, dtype=q.dtype
    )
    return out
