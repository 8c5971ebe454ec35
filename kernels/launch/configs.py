"""Launch parameters of kernels on a GPU: a small measured table, and defaults without an entry.

`configs.json` has `{gpu: {op: {case: fields}}}`. A GPU is its name (`NVIDIA H200`) or, for all of
its kind, its compute capability (`sm_90`). A case names the place of the basis, the stored form of
keys, the head width and the ranks of K and V (`shared-frame-128-128-128`). `spectral-paged bench
tune` writes the table. Nothing is tuned while serving.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from spectral_paged.kernels.launch.card import card_of
from spectral_paged.kernels.page.layout import PageLayout

TABLE = "configs.json"
SEAL_ROWS = (32, 64)  # that kernels were compared with


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Launch parameters of `spectral_decode`.

    programs: the approximate number of programs that attend, to which items are cut.
    splits: programs that share the projection of an item, where pages have their own basis.
    project_programs: programs that project, where pages share a basis.
    project_registers, attend_registers, apply_registers: most registers a thread may take in the
        projection, in attention and in the application of page bases; None leaves it to the
        compiler. Fewer let more programs run at once.
    tile_registers: `attend_registers` of tiles of sequences that share pages.
    second_stream: `decode_attention` reads exact pages at the same time as pages, not before them.
    """

    programs: int = 792
    splits: int = 4
    project_programs: int = 396
    project_registers: int | None = None
    attend_registers: int | None = None
    apply_registers: int | None = None
    tile_registers: int | None = None
    second_stream: bool = False


@dataclass(frozen=True, slots=True)
class SealConfig:
    """Launch parameters of `seal`: warps of a program, and tokens that a pass takes at once.

    Raises:
        ValueError: a pass of other sizes, which would write codes of V to wrong places.
    """

    warps: int = 4
    rows: int = 64

    def __post_init__(self) -> None:
        if self.rows not in SEAL_ROWS:
            raise ValueError(
                f"a seal takes {self.rows} tokens at once; use {' or '.join(map(str, SEAL_ROWS))}"
            )


def case_of(layout: PageLayout) -> str:
    """The case of a layout, a key of the table: `shared-frame-128-128-128`."""
    where = "shared" if layout.k.shared_basis else "page"
    return f"{where}-{layout.rope}-{layout.head_dim}-{layout.k.rank}-{layout.v.rank}"


def gpus_of(device: torch.device) -> tuple[str, ...]:
    """The table's names of a GPU, the closest first; none for a CPU, which interprets kernels."""
    card = card_of(device)
    return () if card is None else (card.name, card.kind)


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch arguments for programmatic dependent launch, where the GPU has it.

    Programs start while the kernel before drains, and wait for its end in `after_previous`. The
    kernels of a layer are so short that their starts would take a visible share of the time.
    """
    card = card_of(device)
    able = card is not None and card.has_dependent_launch
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


def launcher(
    kernel: Any, grid: tuple[int, ...], *, compile_only: bool = False
) -> Callable[..., object]:
    """A function that launches `kernel`, or with `compile_only` only builds it for its launch."""
    if not compile_only:
        launch: Callable[..., object] = kernel[grid]
        return launch

    def build(*args: Any, **options: Any) -> object:
        built = kernel.warmup(*args, grid=grid, **options)
        # `run` has a C compiler build the launch itself, a third of a second; where kernels are
        # interpreted nothing is built
        return built and built.run

    return build


@cache
def launch_table() -> dict[str, Any]:
    """The table of launch parameters, `{gpu: {op: {case: fields}}}`."""
    text = (files("spectral_paged.kernels.launch") / TABLE).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _fields(op: str, layout: PageLayout, device: torch.device) -> dict[str, Any]:
    for gpu in gpus_of(device):
        found: dict[str, Any] | None = launch_table().get(gpu, {}).get(op, {}).get(case_of(layout))
        if found is not None:
            return found
    return {}


def decode_config(layout: PageLayout, device: torch.device) -> DecodeConfig:
    """The launch parameters of decode from pages of `layout` on `device`."""
    return DecodeConfig(**_fields("decode", layout, device))


def seal_config(layout: PageLayout, device: torch.device) -> SealConfig:
    """The launch parameters of sealing to pages of `layout` on `device`."""
    return SealConfig(**_fields("seal", layout, device))
