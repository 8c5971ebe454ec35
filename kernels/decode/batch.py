"""The tokens that N queries of a decode step attend to, shared by all layers of a layer group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.decode.shared_pages import SharedPages
from spectral_paged.kernels.launch.configs import DecodeConfig
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.page.layout import PageLayout


@dataclass(frozen=True, slots=True)
class ExactTokens:
    """Exact tokens of N sequences: landmarks and tail, or all their tokens.

    table: int `[N, max_pages]`, exact pages in 128-byte units; entries past the end are never read.
    counts: int `[N]`, exact tokens of each sequence, the query's own among them.
    dtype: the element type of exact pages.
    first_visible: int `[N]`, the first token that each query sees, counted in the sequence's exact
        pages (a sliding window); None sees all.
    plan: the items into which a GPU cuts the work; None lets the op cut it.
    """

    table: Tensor
    counts: Tensor
    num_kv_heads: int
    dtype: torch.dtype
    first_visible: Tensor | None = None
    plan: DecodePlan | None = None


@dataclass(frozen=True, slots=True)
class Pages:
    """Sealed blocks of N sequences.

    table: int `[N, max_pages]`, pages in 128-byte units; a negative entry is a block held exactly
        and is skipped, entries past `counts` are never read.
    counts: int `[N]`, table entries to visit.
    first_visible: int `[N]`, the first position that each query sees (a sliding window); None sees
        all.
    plan: the items into which a GPU cuts the work; None lets the op cut it.
    config: the launch parameters of a GPU's kernels; None lets the op choose them.
    shared: the first pages of sequences that begin alike; None: each reads all of its own. Ops
        refuse it beside `first_visible`, because a tile's queries see the same tokens.
    """

    table: Tensor
    counts: Tensor
    layout: PageLayout
    rotation: Rotation
    first_visible: Tensor | None = None
    plan: DecodePlan | None = None
    config: DecodeConfig | None = None
    shared: SharedPages | None = None


@dataclass(frozen=True, slots=True)
class Basis:
    """Basis rows `[H, rank, D]` that a layer's pages share; None where pages have their own."""

    k: Tensor | None = None
    v: Tensor | None = None
