"""FlashAttention 3 (Shah et al. 2024), the fastest kernel for chunks on Hopper.

Several packages ship builds of it, and leave different parts out. A `Build` names one. A process
inside another engine hands that engine's over by `use_build`; else the wheel `fa3-fwd` is taken
where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.backend import ChunkKind, capability
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.math.scores import Scores, with_sinks

WHEEL = "fa3_fwd_interface"  # the module of fa3-fwd
Attend = Callable[[Tensor, Tensor, Tensor, ChunkSpans, Scores, tuple[int, int]], Tensor]
AttendWithLse = Callable[
    [Tensor, Tensor, Tensor, ChunkSpans, Scores, tuple[int, int]], tuple[Tensor, Tensor]
]


@dataclass(frozen=True, slots=True)
class Build:
    """A build of FlashAttention 3.

    name: of the package that ships it.
    attend: takes q, k, v, spans, scores and the window, the tokens that a query sees to its left
        and to its right without itself (-1: all). It is causal from the bottom right, and does
        not split keys over programs, so that a sequence's result is the same in every batch.
    dtypes, max_dim: of heads.
    slides, caps: True if windows and soft caps were built.
    attend_with_lse: as `attend`; it returns the log-sum-exp `[Hq, T]` of scores beside the result,
        which sinks need. None: the build gives none.
    """

    name: str
    attend: Attend
    dtypes: tuple[torch.dtype, ...]
    max_dim: int = 256
    slides: bool = True
    caps: bool = True
    attend_with_lse: AttendWithLse | None = None

    def obstacle(self, kind: ChunkKind) -> str | None:
        """Why this build does not take chunks of `kind`; None if it does."""
        if kind.dtype not in self.dtypes:
            return f"as {self.name} has it takes {', '.join(map(str, self.dtypes))}"
        if kind.dim > self.max_dim:
            return f"as {self.name} has it takes heads of up to {self.max_dim}"
        if kind.window is not None and not self.slides:
            return f"as {self.name} has it was built without windows"
        if kind.softcap is not None and not self.caps:
            return f"as {self.name} has it was built without soft caps"
        if kind.has_sinks and self.attend_with_lse is None:
            return f"as {self.name} has it gives no log-sum-exp, which sinks need"
        return None


_given: Build | None = None


def use_build(build: Build | None) -> None:
    """Attend by this build in all of the process from now on; None takes the wheel again."""
    global _given
    _given = build


def build_in_use() -> Build | None:
    """The build that attends to chunks; None if there is none.

    Raises:
        ImportError: fa3-fwd is installed and does not load.
    """
    return _given or _wheel()


@cache
def _wheel() -> Build | None:
    if importlib.util.find_spec(WHEEL) is None:
        return None
    try:
        from fa3_fwd_config import CONFIG
        from fa3_fwd_interface import flash_attn_varlen_func
    except (ImportError, OSError) as error:
        raise ImportError(
            f"fa3-fwd is installed and does not load ({error}): install the release for torch "
            f"{torch.__version__}, or uninstall it"
        ) from error
    flags = CONFIG["build_flags"]

    def built(part: str) -> bool:
        return not flags[f"FLASHATTENTION_DISABLE_{part}"]

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: ChunkSpans,
        scores: Scores,
        window: tuple[int, int],
        **options: bool,
    ) -> Any:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            spans.cu_q,
            spans.cu_k,
            spans.max_q,
            spans.max_k,
            softmax_scale=scores.scale,
            causal=True,
            window_size=window,
            softcap=scores.softcap or 0.0,
            num_splits=1,
            **options,
        )

    return Build(
        "fa3-fwd",
        call,
        (torch.bfloat16, *((torch.float16,) if built("FP16") else ())),
        max(dim for dim in (64, 96, 128, 192, 256) if built(f"HDIM{dim}")),
        built("LOCAL"),
        built("SOFTCAP"),
        partial(call, return_attn_probs=True),  # the log-sum-exp, and no probabilities
    )


def obstacle(kind: ChunkKind) -> str | None:
    if capability(kind.device) != (9, 0):
        return "needs a GPU of compute capability 9.0 (H100, H200)"
    build = build_in_use()
    if build is None:
        return "needs the package fa3-fwd (the extra fa3)"
    return kind.flash_obstacle() or build.obstacle(kind)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: ChunkSpans,
    scores: Scores,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    build, seen = build_in_use(), (-1 if window is None else window - 1, 0)
    assert build is not None, "obstacle was asked"
    if sinks is None:
        return build.attend(q, k, v, spans, scores, seen)
    assert build.attend_with_lse is not None, "obstacle was asked"
    out, lse = build.attend_with_lse(q, k, v, spans, scores, seen)
    return with_sinks(out, lse.T, sinks)
