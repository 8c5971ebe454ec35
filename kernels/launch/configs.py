"""How kernels are launched on a GPU: a small measured table, and what holds where it has no entry.

`launch_configs.json` has `{gpu: {op: {case: fields}}}`: a GPU is its name (`NVIDIA H200`) or, for
all of a kind, its compute capability (`sm_90`); a case says where the basis is, how keys are
turned, the head width and the ranks of K and V (`shared-frame-128-128-128`). `spectral-paged bench
tune` writes it. Nothing is tuned while serving.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from spectral_paged.kernels.page.layout import PageLayout

TABLE = "configs.json"


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Of `spectral_decode`.

    programs: about how many programs attend; items are cut to give so many.
    splits: programs that share the projection of an item, where pages have their own basis.
    project_programs: programs that project, where they share one.
    project_registers, attend_registers, apply_registers: most registers a thread may take in the
        projection, in attention and in the application of page bases; None leaves it to the
        compiler. Fewer let more programs run at once.
    second_stream: `decode_attention` reads exact pages beside pages, not before them.
    """

    programs: int = 792
    splits: int = 4
    project_programs: int = 396
    project_registers: int | None = None
    attend_registers: int | None = None
    apply_registers: int | None = None
    second_stream: bool = False


@dataclass(frozen=True, slots=True)
class SealConfig:
    """Of `seal`: warps of a program, tokens that a pass takes at once."""

    warps: int = 4
    rows: int = 64


def case_of(layout: PageLayout) -> str:
    """The case that a layout is."""
    where = "shared" if layout.k.shared_basis else "page"
    return f"{where}-{layout.rope}-{layout.head_dim}-{layout.k.rank}-{layout.v.rank}"


@cache
def gpus_of(device: torch.device) -> tuple[str, ...]:
    """What the table may call a GPU, the closest first; nothing where kernels are interpreted."""
    if device.type != "cuda":
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch whose programs take their places while the kernel before drains, and
    wait for its end there (programmatic dependent launch, sm_90 and newer). The kernels of a layer
    are short: their starts would show."""
    able = (
        device.type == "cuda"
        and os.environ.get("TRITON_INTERPRET") != "1"
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


def launcher(
    kernel: Any, grid: tuple[int, ...], *, compile_only: bool = False
) -> Callable[..., object]:
    """What launches `kernel`; `compile_only` builds what a launch needs, and launches nothing."""
    if not compile_only:
        launch: Callable[..., object] = kernel[grid]
        return launch

    def build(*args: Any, **options: Any) -> object:
        built = kernel.warmup(*args, grid=grid, **options)
        # `run` is what a C compiler makes of the launch itself, a third of a second; where
        # kernels are interpreted nothing is built
        return built and built.run

    return build


@cache
def launch_table() -> dict[str, Any]:
    """The whole table."""
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
    """How pages of `layout` are read on `device`."""
    return DecodeConfig(**_fields("decode", layout, device))


def seal_config(layout: PageLayout, device: torch.device) -> SealConfig:
    """How pages of `layout` are made on `device`."""
    return SealConfig(**_fields("seal", layout, device))
