"""Kept kernels of chunk attention give the twin's results on a CUDA device; `pytest -m gpu`."""

from __future__ import annotations

import re

import pytest
import torch

from spectral_paged.kernels.chunk import fa3, gpu as chunk_attention_gpu
from spectral_paged.kernels.chunk.backend import ChunkKind
from spectral_paged.kernels.chunk.reference import KEY_GAP, ChunkSpans, chunk_attention
from support.chunk_kernels import chunk_case
from support.kernel_cases import some_sinks
from support.small_cache import small_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KEPT = ("fa3", "xformers", "varlen", "cudnn")


@pytest.mark.parametrize("by", KEPT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window, softcap", [(None, None), (50, None), (None, 3.0), (50, 3.0)])
@pytest.mark.parametrize("group, dim", [(1, 64), (4, 128), (7, 128), (3, 96), (2, 256)])
def test_kept_kernels_attend_to_chunks_as_the_twin_does(by, group, dim, window, softcap, dtype):
    q, k, v, spans = chunk_case(group, dim, dtype, KEY_GAP)
    scores = {"scale": 0.1, "window": window, "softcap": softcap}
    kind = ChunkKind(dtype, dim, q.device, softcap, window)
    why = chunk_attention_gpu.BACKENDS[by].obstacle(kind)
    if why is not None:
        with pytest.raises(ValueError, match=re.escape(f"{by} {why}")):
            chunk_attention_gpu.chunk_attention(q, k, v, spans=spans, by=by, **scores)
        return
    want = chunk_attention(q, k, v, spans=spans, **scores)
    for keys, values in ((k, v), (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))):
        got = chunk_attention_gpu.chunk_attention(q, keys, values, spans=spans, by=by, **scores)
        assert float((got.float() - want).norm() / want.norm()) < 5e-3
    if dim * group == 512:  # one chunk after another, without gaps
        q, k, v, spans = chunk_case(group, dim, dtype, 0)
        want = chunk_attention(q, k, v, spans=spans, **scores)
        got = chunk_attention_gpu.chunk_attention(q, k, v, spans=spans, by=by, **scores)
        assert float((got.float() - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize("by", [*KEPT, "math"])
@pytest.mark.parametrize("window", [None, 50, 128])
@pytest.mark.parametrize("group, dim", [(1, 64), (8, 64), (4, 128)])
def test_kept_kernels_give_sinks_their_part(by, group, dim, window):
    q, k, v, spans = chunk_case(group, dim, torch.bfloat16, KEY_GAP)
    options = {"spans": spans, "scale": 0.1, "window": window}
    options |= {"sinks": some_sinks(2 * group, torch.bfloat16, "cuda")}
    kind = ChunkKind(q.dtype, dim, q.device, None, window, True)
    why = chunk_attention_gpu.BACKENDS[by].obstacle(kind)
    if why is not None:
        with pytest.raises(ValueError, match=re.escape(f"{by} {why}")):
            chunk_attention_gpu.chunk_attention(q, k, v, by=by, **options)
        return
    want = chunk_attention(q, k, v, **options)
    got = chunk_attention_gpu.chunk_attention(q, k, v, by=by, **options)
    assert float((got.float() - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize("by", KEPT)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_chunk_of_nan_spoils_no_other_chunk_of_its_launch(by, dim, bad):
    """Kernels that load whole tiles read past a chunk's keys."""
    q, k, v, spans = chunk_case(4, dim, torch.bfloat16, KEY_GAP)
    if (
        why := chunk_attention_gpu.BACKENDS[by].obstacle(ChunkKind(q.dtype, dim, q.device))
    ) is not None:
        pytest.skip(f"{by} {why}")
    for start in spans.gap_starts:
        k[:, start : start + spans.gap] = torch.nan
        v[:, start : start + spans.gap] = 0
    options = {"spans": spans, "scale": 0.1, "by": by}
    want = chunk_attention_gpu.chunk_attention(q, k, v, **options)
    for place, (_, keys) in enumerate(spans):
        if place == bad:
            k[:, keys] = v[:, keys] = torch.nan
    got = chunk_attention_gpu.chunk_attention(q, k, v, **options)
    for place, (queries, _) in enumerate(spans):
        if place == bad:
            assert got[queries].isnan().any()
        else:
            assert torch.equal(got[queries], want[queries])


@pytest.mark.parametrize("by", KEPT)
def test_a_chunk_in_a_crowd_is_attended_as_alone_to_rounding(by):
    q, k, v, spans = chunk_case(4, 128, torch.bfloat16, KEY_GAP)
    if (
        why := chunk_attention_gpu.BACKENDS[by].obstacle(ChunkKind(q.dtype, 128, q.device))
    ) is not None:
        pytest.skip(f"{by} {why}")
    crowd = chunk_attention_gpu.chunk_attention(q, k, v, spans=spans, scale=0.1, by=by)
    for queries, keys in spans:
        one = ChunkSpans.of([queries.stop - queries.start], [keys.stop - keys.start], q.device)
        alone = chunk_attention_gpu.chunk_attention(
            q[queries], k[:, keys], v[:, keys], spans=one, scale=0.1, by=by
        )
        assert float((alone - crowd[queries]).float().abs().max()) < 4e-3


def test_hopper_attends_to_chunks_by_flash_attention_3_where_it_is_installed():
    if fa3.build_in_use() is None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs fa3-fwd and a GPU of compute capability 9.0")
    cache = small_cache(device="cuda", dtype=torch.bfloat16)
    assert cache.stats()["prefill_backend"] == "fa3"
