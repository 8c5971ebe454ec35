"""Attention of prompt chunks on a GPU, by the first library whose kernel takes them.

```
fa3        FlashAttention 3, on Hopper
xformers   where it has an operator for the GPU
varlen     torch's variable-length FlashAttention 2
sdpa       a chunk at a time by torch's SDPA: fp32 models, and what the others do not take
math       products and softmax by themselves: soft caps and sinks, where no kernel has them
cudnn      cuDNN's kernels, a chunk at a time; by name only
```
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spectral_paged.kernels.chunk import cudnn, fa3, reference as twin, varlen, xformers
from spectral_paged.kernels.chunk.backend import ChunkBackend, ChunkKind
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.math.scores import Scores


class _Twin:
    """The torch twin as a backend; by torch's SDPA, or by products, which cap and have sinks."""

    def __init__(self, *, by_products: bool) -> None:
        self._by_products = by_products

    def obstacle(self, kind: ChunkKind, /) -> str | None:
        if self._by_products:
            return None
        if kind.softcap is not None:
            return "has no soft cap"
        return "gives no log-sum-exp, which sinks need" if kind.has_sinks else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: ChunkSpans,
        scores: Scores,
        window: int | None,
        sinks: Tensor | None = None,
        /,
    ) -> Tensor:
        return twin.chunk_attention(
            q,
            k.transpose(0, 1),
            v.transpose(0, 1),
            spans=spans,
            scale=scores.scale,
            softcap=scores.softcap,
            window=window,
            sinks=sinks,
        )


BACKENDS: Mapping[str, ChunkBackend] = {
    "fa3": fa3,
    "xformers": xformers,
    "varlen": varlen,
    "sdpa": _Twin(by_products=False),
    "math": _Twin(by_products=True),
    "cudnn": cudnn,
}


def backend(kind: ChunkKind) -> str:
    """The name of the backend that attends to chunks of `kind`: the first that takes them."""
    return next(name for name, one in BACKENDS.items() if one.obstacle(kind) is None)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: ChunkSpans,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    by: str | None = None,
) -> Tensor:
    """`chunk.reference.chunk_attention` on a GPU: the same arguments; the result has q's
    dtype where a kernel for half precision runs.

    Args:
        by: a name of `BACKENDS`; None takes the choice of `backend`.

    Raises:
        ValueError: the backend named does not take these chunks; the message says why.
    """
    has_sinks = sinks is not None
    kind = ChunkKind(q.dtype, q.shape[-1], q.device, softcap, window, has_sinks)
    name = by or backend(kind)
    if by is not None and (why := BACKENDS[by].obstacle(kind)) is not None:
        raise ValueError(f"{by} {why}: {backend(kind)} takes these chunks")
    keys, values = (x.transpose(0, 1) for x in (k, v))
    scores = Scores(scale, softcap, has_sinks)
    return BACKENDS[name].attend(q, keys, values, spans, scores, window, sinks)
