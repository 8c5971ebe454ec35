"""Decode attention on a GPU: the choice of a kernel for each part, and the order of their launches.

The portable Triton kernels read every layout that `check_layout` lets pass. A Gluon kernel with
explicit layouts replaces one of them where it supports the layout and the GPU has INT8 tensor
cores. The choice depends on layout and capability only, so no kernel falls back after an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from spectral_paged.kernels.decode.batch import Basis, ExactTokens, Pages
from spectral_paged.kernels.decode.gluon import (
    apply as apply_gluon,
    attend as attend_gluon,
    project as project_gluon,
    project_shared as project_shared_gluon,
)
from spectral_paged.kernels.decode.parts import (
    ExactPartials,
    Partials,
    ScoreOptions,
    TilePartials,
)
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.decode.shared_pages import SharedPages, check_no_window
from spectral_paged.kernels.decode.triton import (
    apply as apply_triton,
    attend as attend_triton,
    project as project_triton,
)
from spectral_paged.kernels.decode.triton.exact import attend_exact, plan_exact
from spectral_paged.kernels.decode.triton.finish import finish, merge_items
from spectral_paged.kernels.launch.card import card_of
from spectral_paged.kernels.launch.configs import DecodeConfig, decode_config
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import check_layout

# projection, attention, application of page bases
PORTABLE: tuple[ModuleType, ...] = (
    project_triton,
    attend_triton,
    apply_triton,
)


def plan_pages(
    layout: PageLayout,
    num_pages: Tensor,
    max_entries: int,
    config: DecodeConfig | None = None,
    starts: Tensor | None = None,
) -> DecodePlan:
    """The items of a decode step over pages.

    Args:
        num_pages: int `[N]`, table entries to visit.
        max_entries: a bound on their sum.
        config: launch parameters; the default is `decode_config` of the GPU.
        starts: int `[N]`, the first entries to visit; None: 0.
    """
    if config is None:
        config = decode_config(layout, num_pages.device)
    target = max(1, config.programs // layout.num_kv_heads)
    return DecodePlan.of(
        num_pages if starts is None else num_pages - starts,
        max_entries=max_entries,
        target_items=target,
        by_entry=layout.k.shared_basis,
        starts=starts,
    )


def has_tensor_cores(device: torch.device) -> bool:
    """Return whether `device` runs Gluon kernels: it is sm_80 or newer, and not interpreted."""
    card = card_of(device)
    return card is not None and card.has_tensor_cores


def _explicit_parts(
    layout: PageLayout, group: int, rotary_dim: int
) -> tuple[tuple[ModuleType, bool], ...]:
    """The Gluon module of each part, and whether it supports the layout.

    Parts are projection, attention and the application of page bases. A part that never runs
    (page bases, where the basis is shared) counts as supported.
    """
    projection = project_shared_gluon if layout.k.shared_basis else project_gluon
    return (
        (projection, projection.supports(layout, rotary_dim)),
        (attend_gluon, attend_gluon.supports(layout, group)),
        (apply_gluon, layout.v.shared_basis or apply_gluon.supports(layout)),
    )


def implementation(
    layout: PageLayout, group: int, device: torch.device, rotary_dim: int | None = None
) -> str:
    """The decode backend of `layout` as `stats()` reports it: `gluon`, `triton`, or
    `gluon and triton` where Gluon supports only some parts."""
    parts = _explicit_parts(layout, group, rotary_dim or layout.head_dim)
    fits = [fit for _, fit in parts]
    if not has_tensor_cores(device) or not any(fits[:2]):
        return "triton"
    return "gluon" if all(fits) else "gluon and triton"


def attend_pages(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    *,
    layout: PageLayout,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    k_basis: Tensor | None,
    plan: DecodePlan,
    config: DecodeConfig,
    options: ScoreOptions,
    explicit: bool | None = None,
) -> Partials:
    """Partial results of the items of `plan`, which `finish` merges; see `spectral_decode`."""
    group = q.shape[1] // layout.num_kv_heads
    able = has_tensor_cores(q.device) if explicit is None else explicit
    parts = _explicit_parts(layout, group, 2 * cos.shape[-1])
    projection, attention, bases = (
        explicit_kernel if able and fits else portable
        for (explicit_kernel, fits), portable in zip(parts, PORTABLE, strict=True)
    )
    projected = projection.project_queries(
        q,
        plane,
        table,
        layout=layout,
        first_position=options.first_position,
        cos=cos,
        sin=sin,
        scale=scale,
        basis=k_basis,
        plan=plan,
        config=config,
    )
    partials: Partials = attention.attend_pages(
        q, plane, table, projected, layout=layout, plan=plan, options=options, config=config
    )
    if not layout.v.shared_basis:
        partials = bases.apply_bases(
            q, plane, table, partials, layout=layout, plan=plan, config=config
        )
    return partials


def attend_planned(
    q: Tensor,
    plane: Tensor,
    pages: Pages,
    scores: Scores,
    basis: Tensor | None,
    explicit: bool | None = None,
) -> tuple[Partials, TilePartials | None]:
    """Partial results over planned `pages`, and those of the tiles that read what is shared.

    A tile has more queries a KV head than a sequence, so its accumulators take more registers.

    Args:
        basis: K's, where pages share it.
    """
    rotation, shared = pages.rotation, pages.shared

    def attend(q: Tensor, table: Tensor, plan: DecodePlan | None, config: DecodeConfig) -> Partials:
        assert plan is not None, "the pages are planned"
        return attend_pages(
            q,
            plane,
            table,
            layout=pages.layout,
            cos=rotation.cos,
            sin=rotation.sin,
            scale=scores.scale,
            k_basis=basis,
            plan=plan,
            config=config,
            options=ScoreOptions(rotation.first_position, scores.softcap, pages.first_visible),
            explicit=explicit,
        )

    config = pages.config
    assert config is not None, "the pages are planned"
    tiles = None
    if shared is not None:
        check_no_window(pages.first_visible)
        wide = replace(config, attend_registers=config.tile_registers)
        found = attend(shared.queries(q), shared.table, shared.plan, wide)
        assert shared.plan is not None
        tiles = TilePartials(found, shared.plan.first_item, shared.seats, shared.seats_per_tile)
    return attend(q, pages.table, pages.plan, config), tiles


def spectral_decode(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    num_pages: Tensor,
    *,
    layout: PageLayout,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    k_basis: Tensor | None = None,
    v_basis: Tensor | None = None,
    softcap: float | None = None,
    first_visible: Tensor | None = None,
    shared: SharedPages | None = None,
    plan: DecodePlan | None = None,
    explicit: bool | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode.reference.spectral_decode` on a GPU: the same arguments and results.

    Args:
        plan: `plan_pages` of this step, the same for all layers; made here where it is missing.
        explicit: True takes Gluon kernels where they support the layout, and False takes Triton's.
            None is True where `has_tensor_cores`, else False.
        config: launch parameters; the default is `decode_config` of the GPU.

    Raises:
        ValueError: no kernel reads the layout, and the message names one to use instead; or both
            `shared` and `first_visible`.
    """
    check_layout(layout)
    rotation = Rotation(cos, sin, first_position)
    pages = Pages(table, num_pages, layout, rotation, first_visible, plan, config, shared)
    pages = planned_pages(pages, table.numel())
    partials, tiles = attend_planned(q, plane, pages, Scores(scale, softcap), k_basis, explicit)
    assert pages.plan is not None
    return finish(q, partials, layout=layout, basis=v_basis, plan=pages.plan, tiles=tiles)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _begin(
    attend: Callable[[], Partials], device: torch.device, second_stream: bool
) -> Callable[[], Partials]:
    """Queue `attend`, on a second stream if asked; the function returned joins it to the first.

    No memory is overwritten while it is read: only the second stream uses its memory until the
    join, and uses it again only behind the next fork, which waits for the work queued on the first.
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


def planned_exact(exact: ExactTokens, max_pages: int) -> ExactTokens:
    """`exact` with its DecodePlan, which all layers share.

    `max_pages` bounds the number of exact pages of all sequences together.
    """
    return replace(exact, plan=plan_exact(exact.counts, max_pages, exact.num_kv_heads))


def planned_pages(pages: Pages, max_entries: int, max_shared: int | None = None) -> Pages:
    """`pages` with its DecodePlans and launch parameters, which all layers share.

    A plan that is there already is kept.

    Args:
        max_entries: a bound on the number of table entries that all sequences read themselves.
        max_shared: a bound on those that all tiles read together; None: as many.
    """
    config = pages.config or decode_config(pages.layout, pages.counts.device)
    shared, plan = pages.shared, pages.plan
    if plan is None:
        starts = None if shared is None else shared.starts
        plan = plan_pages(pages.layout, pages.counts, max_entries, config, starts)
    if shared is not None and shared.plan is None:
        most = max_entries if max_shared is None else max_shared
        of_tiles = plan_pages(pages.layout, shared.counts, most, config)
        shared = replace(shared, plan=of_tiles)
    return replace(pages, plan=plan, config=config, shared=shared)


def decode_attention(
    q: Tensor,
    plane: Tensor,
    exact: ExactTokens,
    pages: Pages | None,
    scores: Scores,
    basis: Basis,
    sinks: Tensor | None = None,
) -> Tensor:
    """`decode.reference.decode_attention` on a GPU: the same arguments and results.

    A DecodePlan that `exact` or `pages` lacks is made here.

    Raises:
        ValueError: no kernel reads the layout; the message names one to use instead.
    """
    if exact.plan is None:
        exact = planned_exact(exact, exact.table.numel())
    exact_plan = exact.plan
    assert exact_plan is not None

    def attend() -> Partials:
        return attend_exact(
            q,
            plane,
            exact.table,
            exact.counts,
            num_kv_heads=exact.num_kv_heads,
            scale=scores.scale,
            dtype=exact.dtype,
            plan=exact_plan,
            options=ScoreOptions(0, scores.softcap, exact.first_visible),
        )

    if pages is None:
        return merge_items(q, attend(), exact_plan.first_item, sinks=sinks, dtype=q.dtype)[0]
    check_layout(pages.layout)
    if pages.plan is None or pages.config is None:
        pages = planned_pages(pages, pages.table.numel())
    plan, config = pages.plan, pages.config
    assert plan is not None and config is not None
    join = _begin(attend, q.device, config.second_stream)
    partials, tiles = attend_planned(q, plane, pages, scores, basis.k)
    out, _ = finish(
        q,
        partials,
        layout=pages.layout,
        basis=basis.v,
        plan=plan,
        beside=ExactPartials(join(), exact_plan.first_item),
        tiles=tiles,
        sinks=sinks,
        dtype=q.dtype,
    )
    return out
