"""One build of a kernel serves all of its launches: no serving step waits for a compiler."""

from __future__ import annotations

import random

import pytest
import torch

from spectral_paged import PageFormat, SpectralKVCache
from spectral_paged.cache import cache as cache_module
from spectral_paged.kernels.decode import gpu as decode_gpu
from spectral_paged.kernels.decode.triton.exact import exact_decode
from spectral_paged.kernels.exact.triton import exact_append
from spectral_paged.kernels.launch.configs import DecodeConfig
from spectral_paged.kernels.ops.gpu import GpuOps
from spectral_paged.kernels.seal.triton import seal as seal_triton
from spectral_paged.rope import RotaryTable
from support.kernel_cases import (
    PAGES,
    SEAL_SHAPES,
    attend,
    attend_case,
    blocks_at_once,
    exact_case,
    seal_zeros,
)
from support.kernel_launches import record_launches, varying
from support.page_parts import toy_basis


@pytest.fixture
def builds(monkeypatch):
    return record_launches(monkeypatch)


@pytest.mark.parametrize("shape", [*SEAL_SHAPES, (5, 1, 64)])
def test_a_seal_of_any_number_of_blocks_needs_one_build(builds, shape):
    """A launch takes as many blocks as fit the workspace, so further ones begin at odd places."""
    at_once = blocks_at_once(shape)
    for blocks in (1, at_once, at_once + 1, 3 * at_once + 2):
        seal_zeros(seal_triton.seal, shape, blocks, compile_only=blocks == 1)
    assert len(builds) == 4  # two kernels, each for K and for V
    assert {len(launches) for launches in builds.values()} == {1 + 1 + 2 + 4}
    assert varying(builds) == {}


@pytest.mark.parametrize("heads, dim", [(1, 64), (3, 24), (8, 128)])
def test_an_append_of_any_number_of_tokens_needs_one_build(builds, heads, dim):
    """K and V are slices of one product, and a single token has any stride."""
    plane = torch.zeros(1 << 14, dtype=torch.uint8)
    units = torch.zeros(64, dtype=torch.int32)
    for count in (1, 2, 17):
        wide = torch.zeros(count, 4 * heads * dim, dtype=torch.bfloat16)
        k, v = (x.unflatten(1, (heads, dim)) for x in wide.chunk(4, dim=1)[1:3])
        for first in (0, 1, 7):
            places = units[first : first + count]
            exact_append(k, v, plane, places, places)
            if count == 1:
                odd = k.as_strided(k.shape, (7, dim, 1), k.storage_offset())
                exact_append(odd, odd, plane, places, places)
    assert len(builds) == 1 and len(next(iter(builds.values()))) == 12
    assert varying(builds) == {}


def serve(cache, seed):
    """Feed a cache three sequences of about 1,500 tokens, in steps of any mixture and size."""
    draw = random.Random(seed)
    prompts = {s: draw.randint(1150, 1400) for s in "abc"}
    done = dict.fromkeys(prompts, 0)
    for s, count in prompts.items():
        cache.add_sequence(s, num_prompt_tokens=count)
    heads, dim = cache.format.num_kv_heads, cache.format.head_dim
    while any(done[s] < prompts[s] + 130 for s in prompts):
        need = {}
        for s, count in prompts.items():
            if done[s] < prompts[s] + 130 and draw.random() < 0.8:
                most = min(count - done[s], cache.chunk_limit(s))
                need[s] = draw.choice([most, draw.randint(1, most)]) if most > 0 else 1
        if not need:
            continue
        cache.begin_step(cache.reserve(need))
        total = sum(need.values())
        for layer in range(cache.num_layers):
            # as a fused product hands them over
            q, k, v = torch.zeros(total, 4 * heads * dim).split(
                [2 * heads * dim, heads * dim, heads * dim], dim=1
            )
            q, k, v = (x.unflatten(1, (-1, dim)) for x in (q, k, v))
            cache.attend(layer, q, k, v)
        cache.end_step()
        for s, n in need.items():
            done[s] += n
    assert cache.stats()["pages_attended"] > 0


@pytest.mark.parametrize("explicit", [True, False], ids=["gluon", "triton"])
@pytest.mark.parametrize(
    "name, windows",
    [("quality-64", [None, 1100]), ("int8-post-64", [None, None]), ("slots-without-gain", [None])],
)
def test_a_served_cache_builds_each_kernel_once(builds, monkeypatch, name, windows, explicit):
    monkeypatch.setattr(cache_module, "page_ops", lambda device: GpuOps())
    monkeypatch.setattr(decode_gpu, "has_tensor_cores", lambda device: explicit)
    monkeypatch.setattr(seal_triton, "WORKSPACE_BYTES", 1)  # a block a launch
    dim, fields = PAGES[name]
    format = PageFormat("t", 1, dim, num_landmark_tokens=64, **fields)
    cache = SpectralKVCache(
        num_layers=len(windows),
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=dim,
        format=format,
        rope=RotaryTable.from_theta(10000.0, dim, max_positions=2048),
        sliding_windows=windows,
        kv_cache_bytes=16 << 20,
        max_num_seqs=4,
        calibration=toy_basis(len(windows), 1, dim) if format.needs_calibration else None,
        device="cpu",
    )
    for group in cache.groups:
        cache.sealer.warm_up(group)
        cache.attention.warm_up(group)
    serve(cache, seed=1)
    ran = {kernel for kernel, _ in builds}
    assert {"exact.triton._append_kernel", "rebuild.triton._rebuild_kernel"} <= ran
    assert "exact.triton._copy_kernel" in ran
    assert any("attend._attend_kernel" in kernel for kernel in ran)
    assert varying(builds) == {}


@pytest.mark.parametrize("name", ["quality-64", "int8-post-64"])
@pytest.mark.parametrize("pages", [True, False])
def test_sinks_add_no_launch_and_may_lie_anywhere(builds, name, pages):
    args, options = attend_case(name, (2, 1), (70, 3))
    if not pages:
        args = (*args[:4], None, args[5])
    sinks, counts = torch.zeros(9, dtype=torch.bfloat16), []
    config = DecodeConfig(second_stream=False)
    for given in (None, sinks[:6], sinks[1:7]):
        attend(decode_gpu.decode_attention, args, options | {"sinks": given}, config=config)
        counts.append(sum(map(len, builds.values())))
    assert counts == [counts[0], 2 * counts[0], 3 * counts[0]]
    merges = {constants for kernel, constants in builds if kernel.endswith("_reduce_kernel")}
    assert len(merges) == 2 and varying(builds) == {}


def test_a_build_that_depends_on_alignment_is_noticed(builds):
    """The check itself, by a table that begins in the middle of a tensor."""
    args, options = exact_case([65], dim=64)
    for moved in (0, 1):
        table = torch.zeros(1, 64, dtype=torch.int32)[:, moved:]
        exact_decode(*args[:2], table, args[3], **options)
    assert set(varying(builds)) == {("decode.triton.exact._exact_kernel", "table_ptr")}
