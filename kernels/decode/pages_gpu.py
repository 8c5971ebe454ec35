"""Decode attention straight from spectral pages on a GPU: which kernel does which part.

The portable Triton kernels read every layout that `check_layout` lets pass. Where a layout fits and
the GPU has INT8 tensor cores, kernels with explicit layouts (Gluon) take over a part. The choice is
by layout and capability alone, never by what went wrong.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from spectral_paged.kernels.decode.gluon import (
    apply as page_basis_gluon,
    attend as spectral_decode_gluon,
    project as query_projection_gluon,
    project_shared as shared_projection_gluon,
)
from spectral_paged.kernels.decode.parts import Partials, ScoreOptions
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.decode.triton import (
    apply as page_basis_triton,
    attend as spectral_decode_triton,
    project as query_projection_triton,
)
from spectral_paged.kernels.decode.triton.finish import finish
from spectral_paged.kernels.launch.configs import DecodeConfig, decode_config
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import check_layout

# projection, attention, application of page bases
PORTABLE: tuple[ModuleType, ...] = (
    query_projection_triton,
    spectral_decode_triton,
    page_basis_triton,
)


def plan_pages(
    layout: PageLayout,
    num_pages: Tensor,
    max_entries: int,
    config: DecodeConfig | None = None,
) -> DecodePlan:
    """The items of a decode step over pages.

    Args:
        num_pages: int `[N]`, table entries to visit.
        max_entries: a bound on their sum.
        config: default what `launch_configs` has for the GPU.
    """
    if config is None:
        config = decode_config(layout, num_pages.device)
    target = max(1, config.programs // layout.num_kv_heads)
    return DecodePlan.of(
        num_pages, max_entries=max_entries, target_items=target, by_entry=layout.k.shared_basis
    )


def has_tensor_cores(device: torch.device) -> bool:
    """Whether kernels with explicit layouts run here: sm_80 or newer, not the interpreter."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _explicit_parts(
    layout: PageLayout, group: int, rotary_dim: int
) -> tuple[tuple[ModuleType, bool], ...]:
    """What has explicit layouts for projection, attention and the application of page bases, and
    whether it fits; what does not run counts as it does."""
    projection = shared_projection_gluon if layout.k.shared_basis else query_projection_gluon
    return (
        (projection, projection.supports(layout, rotary_dim)),
        (spectral_decode_gluon, spectral_decode_gluon.supports(layout, group)),
        (page_basis_gluon, layout.v.shared_basis or page_basis_gluon.supports(layout)),
    )


def implementation(
    layout: PageLayout, group: int, device: torch.device, rotary_dim: int | None = None
) -> str:
    """What reads pages of `layout`, as `stats()` reports it: `gluon`, `triton`, or
    `gluon and triton` where only some parts have explicit layouts."""
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
    """The items of `plan`, not yet merged: what `finish` takes; see `spectral_decode`."""
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
    plan: DecodePlan | None = None,
    explicit: bool | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.spectral_decode.spectral_decode` on a GPU: the same arguments and results.

    Args:
        plan: `plan_pages` of this step, the same for all layers; made here where it is missing.
        explicit: kernels with explicit layouts; None where they fit.
        config: how kernels are launched; default what `launch_configs` has for the GPU.

    Raises:
        ValueError: a layout that no kernel reads; the message says what to use instead.
    """
    check_layout(layout)
    if config is None:
        config = decode_config(layout, q.device)
    if plan is None:
        plan = plan_pages(layout, num_pages, table.shape[0] * table.shape[1], config)
    partials = attend_pages(
        q,
        plane,
        table,
        layout=layout,
        cos=cos,
        sin=sin,
        scale=scale,
        k_basis=k_basis,
        plan=plan,
        config=config,
        options=ScoreOptions(first_position, softcap, first_visible),
        explicit=explicit,
    )
    return finish(q, partials, layout=layout, basis=v_basis, plan=plan)
