"""Kernels and caches give the CPU's results on a CUDA device; run with `pytest -m gpu`."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spectral_paged import LLM, PageFormat, SpectralKVCache
from spectral_paged.errors import FormatError
from spectral_paged.pages import decode_pages, encode_pages
from spectral_paged.rope import RotaryTable
from support.kernel_cases import (
    MILD,
    PAGES,
    SEAL_SHAPES,
    SEALED,
    SealCase,
    append_both,
    attend_case,
    attend_error,
    blocks_at_once,
    captured_case,
    copy_both,
    exact_case,
    exact_error,
    page_case,
    page_error,
    placed_pages,
    rebuild_error,
    seal_zeros,
    shared_case,
    some_sinks,
)
from support.page_parts import toy_basis
from support.small_cache import feed, small_cache
from support.tiny_model import tiny_format, tiny_model

if torch.cuda.is_available():  # elsewhere the kernels run in the interpreter, in other tests
    from spectral_paged.kernels.decode.gpu import decode_attention, spectral_decode
    from spectral_paged.kernels.decode.triton.exact import exact_decode
    from spectral_paged.kernels.exact import triton as exact_triton
    from spectral_paged.kernels.exact.triton import exact_append, exact_copy
    from spectral_paged.kernels.launch.configs import DecodeConfig
    from spectral_paged.kernels.rebuild import triton as spectral_rebuild_triton
    from spectral_paged.kernels.rebuild.triton import spectral_rebuild
    from spectral_paged.kernels.seal.triton import seal as seal_triton
    from spectral_paged.kernels.seal.triton.seal import seal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_page_encoded_on_the_gpu_is_as_good_as_one_of_the_cpu():
    format = tiny_format()
    x = torch.randn(2, 5, 2, 512, 6) @ torch.randn(2, 5, 2, 6, 16)
    for side, (k, v) in enumerate(((x[0], x[1]), (x[0].cuda(), x[1].cuda()))):
        for got, want in zip(decode_pages(encode_pages(k, v, format), format), (x[0], x[1])):
            assert float((got.cpu() - want).norm() / want.norm()) < 0.01, side


# ---- kernels -----------------------------------------------------------------------------

RAGGED = (0, 3, 1, 5)


@pytest.mark.parametrize("explicit", [True, False], ids=["gluon", "triton"])
@pytest.mark.parametrize(
    "name, group",
    [
        *((name, 4) for name in PAGES),
        *((name, g) for name in ("quality-128", "int8-128") for g in (1, 3, 7, 8, 16)),
    ],
)
def test_pages_are_read_as_the_twin_reads_them(name, group, explicit):
    """Where a layout has no explicit kernel, `explicit` takes the portable one."""
    args, options = page_case(name, heads=2, group=group, counts=RAGGED, device="cuda")
    assert page_error(spectral_decode, args, options, explicit=explicit) < 2e-3


@pytest.mark.parametrize("explicit", [True, False], ids=["gluon", "triton"])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize(
    "name", ["quality-64", "quality-128", "compact-128", "int8-128", "slots-without-gain"]
)
def test_shared_pages_are_read_as_the_twin_reads_them(name, group, explicit):
    """Several groups, more members than a tile has seats, and sequences alone."""
    groups = [(3, (1, 0, 0, 2, 0, 0, 0)), (1, (2, 0)), (2, (0, 1, 0))]
    if group == 8:  # a tile has two seats
        groups[0], groups[2] = (3, (1, 0, 0, 2)), (2, (0, 1))
    args, options, shared = shared_case(name, groups, (0, 3), heads=2, group=group, device="cuda")
    for scores in ({}, {"softcap": 3.0}):
        error = page_error(
            spectral_decode, args, options, scores=scores, shared=shared, explicit=explicit
        )
        assert error < 2e-3


@pytest.mark.parametrize("explicit", [True, False], ids=["gluon", "triton"])
@pytest.mark.parametrize("name", ["quality-64", "quality-128", "int8-128"])
def test_sixty_four_sequences_share_pages(name, explicit):
    groups = [(5, (*[0] * 63, 1))]
    args, options, shared = shared_case(name, groups, heads=2, group=4, device="cuda")
    error = page_error(spectral_decode, args, options, shared=shared, explicit=explicit)
    assert error < 2e-3


@pytest.mark.parametrize("explicit", [True, False], ids=["gluon", "triton"])
@pytest.mark.parametrize("name", ["quality-128", "compact-128", "int8-128"])
def test_biased_keys_of_a_real_model_are_read_to_the_twins_precision(name, explicit):
    args, options = captured_case(name, device="cuda")
    assert page_error(spectral_decode, args, options, explicit=explicit) < 5e-3


@pytest.mark.parametrize("explicit", [True, False], ids=["gluon", "triton"])
@pytest.mark.parametrize("name", ["quality-128", "int8-128", "slots-without-gain"])
def test_scores_are_capped_and_windows_hide_what_lies_before_them(name, explicit):
    args, options = page_case(name, heads=2, group=4, counts=(1, 3, 2, 2), device="cuda")
    visible = torch.tensor([0, 800, 10_000, 64 + 129], device="cuda")
    for scores in ({"softcap": 3.0}, {"softcap": 3.0, "first_visible": visible}):
        error = page_error(spectral_decode, args, options, scores=scores, explicit=explicit)
        assert error < 2e-3


@pytest.mark.parametrize("target", [1, 2, 64])
@pytest.mark.parametrize("name", ["quality-64", "quality-128", "compact-128", "int8-128"])
def test_the_number_of_splits_changes_nothing_that_shows(name, target):
    args, options = page_case(name, heads=2, group=4, counts=RAGGED, device="cuda")
    whole = spectral_decode(*args, **options)
    split = spectral_decode(*args, **options, config=DecodeConfig(programs=target))
    for x, y in zip(split, whole):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("name", ["quality-128", "int8-128"])
def test_the_same_call_gives_the_same_bits(name):
    args, options = page_case(name, heads=2, group=4, counts=RAGGED, device="cuda")
    first, second = (spectral_decode(*args, **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_a_graph_captured_once_serves_other_lengths_and_tables():
    (q, plane, table, counts), options = page_case(
        "quality-128", heads=2, group=4, counts=(4, 2), device="cuda"
    )
    static_table, static_counts = table.clone(), counts.clone()
    spectral_decode(q, plane, static_table, static_counts, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spectral_decode(q, plane, static_table, static_counts, **options)
    for rows, lengths in (((0, 1), (4, 2)), ((1, 0), (1, 3)), ((0, 1), (0, 1))):
        static_table.copy_(table[list(rows)])
        static_counts.copy_(torch.tensor(lengths))
        graph.replay()
        want = spectral_decode(q, plane, static_table, static_counts, **options)
        assert all(torch.equal(x, y) for x, y in zip(out, want))


def test_pages_past_two_gigabytes_are_found():
    (q, plane, table, counts), options = page_case(
        "quality-128", heads=2, group=4, counts=(2,), device="cuda"
    )
    far = (5 << 30) // 128
    large = torch.empty((5 << 30) + plane.numel(), dtype=torch.uint8, device="cuda")
    large[far * 128 :] = plane
    want = spectral_decode(q, plane, table, counts, **options)
    moved = torch.where(table < 10**6, table + far, table)
    got = spectral_decode(q, large, moved, counts, **options)
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("group", [1, 3, 7, 16])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_pages_are_read_as_the_twin_reads_them(group, dim, dtype):
    counts = [1, 63, 64, 0, 65, 300, 2000]
    args, options = exact_case(counts, group=group, dim=dim, dtype=dtype, device="cuda")
    # weights are rounded to the pages' dtype, as every flash kernel does
    limit = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert exact_error(exact_decode, args, options) < limit


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("name", ["quality-128", "compact-128", "int8-128", "int8-post-64"])
def test_landmarks_pages_and_tail_are_one_softmax(name, group):
    tokens = (70, 0, 64, 0, 600)
    args, options = attend_case(name, (0, 3, 1, 0, 2), tokens, group=group, device="cuda")
    assert attend_error(decode_attention, args, options) < 2e-3
    args = (*args[:4], None, args[5] * 0)
    assert attend_error(decode_attention, args, options) < 1e-4


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["quality-128", "int8-post-64"])
def test_a_window_over_all_tiers_hides_what_lies_before_it(name, softcap):
    args, options = attend_case(
        name, (1, 2, 1, 2, 2), (70, 70, 130, 64, 100), group=4, device="cuda"
    )
    args[4][4, 0] = -1
    scores = {
        "softcap": softcap,
        "first_exact": torch.tensor([0, 64, 100, 60, 64], dtype=torch.int32, device="cuda"),
        "first_visible": torch.tensor([0, 700, 2000, 5000, 600], dtype=torch.int32, device="cuda"),
    }
    assert attend_error(decode_attention, args, options | scores) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("name", ["quality-64", "int8-128", "int8-post-64"])
def test_a_sink_takes_its_part_of_a_softmax_over_all_tiers(name, group, dtype):
    tokens = (70, 0, 64, 0, 600)
    args, options = attend_case(name, (0, 3, 1, 0, 2), tokens, group=group, device="cuda")
    options = options | MILD | {"sinks": some_sinks(2 * group, dtype, "cuda")}
    assert attend_error(decode_attention, args, options) < 2e-3
    args = (*args[:4], None, args[5] * 0)
    assert attend_error(decode_attention, args, options) < 1e-4


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("name", ["quality-64", "int8-post-64"])
def test_layers_that_differ_answer_as_on_the_cpu(name, softcap):
    """Windows exact and sealed, a table with interleaved pairs, and no rotation at all."""
    table = RotaryTable.from_theta(10000.0, 64, max_positions=3000)
    pairs = RotaryTable(table.cos, table.sin, interleaved=True)
    format = PageFormat("t", 1, 64, num_landmark_tokens=64, **PAGES[name][1])
    outs = []
    for device in ("cpu", "cuda"):
        cache = SpectralKVCache(
            num_layers=4,
            num_q_heads=2,
            num_kv_heads=1,
            head_dim=64,
            format=format,
            rope=[table, pairs, None, table],
            sliding_windows=[None, 1100, None, 200],
            softcap=softcap,
            kv_cache_bytes=16 << 20,
            max_num_seqs=4,
            device=device,
            debug_poison=True,
            calibration=toy_basis(4, 1, 64) if format.needs_calibration else None,
        )
        generator, found, at = torch.Generator().manual_seed(1), [], 0
        cache.add_sequence("a", num_prompt_tokens=2000)
        while at < 2040:
            count = max(1, min(cache.chunk_limit("a"), 2000 - at))
            cache.begin_step(cache.reserve({"a": count}))
            for layer in range(4):
                qkv = [torch.randn(count, h, 64, generator=generator) for h in (2, 1, 1)]
                found.append(cache.attend(layer, *(x.to(device) for x in qkv)).cpu())
            assert not cache.end_step().failed
            at += count
        assert not cache.settle().failed
        cache.check_integrity()
        outs.append(torch.cat(found))
    assert float((outs[0] - outs[1]).norm() / outs[0].norm()) < 1e-2


def test_attention_to_all_tiers_has_the_dtype_of_its_queries():
    args, options = attend_case("quality-128", (1, 2), (65, 1), dtype=torch.bfloat16, device="cuda")
    args = (args[0].bfloat16(), *args[1:])
    assert attend_error(decode_attention, args, options) < 2e-2


@pytest.mark.parametrize("name", PAGES)
def test_history_is_rebuilt_as_the_twin_rebuilds_it(name):
    args, options = page_case(name, heads=2, device="cuda")
    assert rebuild_error(spectral_rebuild, args, options) < 1e-5


@pytest.mark.parametrize("name", PAGES)
def test_pages_of_several_sequences_are_rebuilt_where_they_belong(name):
    args, options = page_case(name, heads=2, counts=(3, 4), device="cuda")
    got, want = placed_pages(spectral_rebuild, args, options, dtype=torch.bfloat16)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 24, 64, 96, 128, 256])
def test_exact_pages_are_copied_as_the_twin_copies_them(dtype, dim):
    want, got = copy_both(exact_copy, dtype=dtype, dim=dim, device="cuda")
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_append_writes_the_bytes_that_the_twin_writes(dtype):
    want, got = append_both(exact_append, dtype=dtype, device="cuda")
    assert torch.equal(got, want)


def test_tokens_two_gigabytes_of_elements_apart_are_appended():
    """A token's place in its tensor is past 2^31 where steps and fused products are large."""
    far = torch.zeros((1 << 31) + 128, dtype=torch.bfloat16, device="cuda")
    k, v = (far.as_strided((3, 1, 64), (1 << 30, 64, 1), at) for at in (0, 64))
    k.copy_(torch.randn(k.shape))
    v.copy_(torch.randn(v.shape))
    places = torch.arange(3, dtype=torch.int32, device="cuda")
    planes = [torch.zeros(1 << 14, dtype=torch.uint8, device="cuda") for _ in range(2)]
    exact_append(k, v, planes[0], places * 0, places)
    exact_append(k.contiguous(), v.contiguous(), planes[1], places * 0, places)
    assert torch.equal(*planes) and planes[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SEALED)
def test_a_sealed_page_is_as_good_as_the_twins(name, dtype):
    case = SealCase(name, device="cuda", dtype=dtype)
    assert not case.seal(seal).any()
    for block in range(2):
        for got, want in zip(*case.errors(block)):
            assert got < 1.02 * want


def test_a_sealed_page_does_not_depend_on_what_is_sealed_beside_it():
    case = SealCase("quality-128", heads=8, blocks=5, device="cuda", dtype=torch.bfloat16)
    case.seal(seal)
    together = [case.page(b) for b in range(5)]
    case.arena[:, int(case.pages.min()) * 128 :] = 255
    for b in range(5):
        case.seal(seal, slice(b, b + 1))
    assert all(torch.equal(case.page(b), together[b]) for b in range(5))


def test_blocks_past_two_gigabytes_are_sealed():
    case = SealCase("quality-64", device="cuda")
    case.seal(seal)
    want = [case.page(b) for b in range(2)]
    far = (3 << 30) // 128
    large = torch.zeros(2, (3 << 30) + case.arena.shape[1], dtype=torch.uint8, device="cuda")
    large[:, far * 128 :] = case.arena
    large[:, far * 128 + int(case.pages.min()) * 128 :] = 255
    case.arena, case.exact, case.pages = large, case.exact + far, case.pages + far
    case.seal(seal)
    assert all(torch.equal(case.page(b), want[b]) for b in range(2))


def test_nan_and_inf_are_counted_where_they_lie():
    def spoil(k, v):
        v[1, 0, 1, 511, 63] = float("nan")
        k[1, 1, 0, 0, 0] = float("inf")

    case = SealCase("quality-64", device="cuda", change=spoil)
    bad = case.seal(seal)
    assert bool(bad[1, 0, 1, 1] > 0) and bool(bad[1, 1, 0, 0] > 0)
    assert not bad[0].any() and not bad[1, 0, 0].any()


def test_a_cache_on_the_gpu_seals_rebuilds_and_reads_by_kernels_only():
    found = []
    for device in ("cpu", "cuda"):
        cache = small_cache(device=device)
        for seq_id in "ab":
            cache.add_sequence(seq_id, num_prompt_tokens=1200)
        outs, failed = feed(cache, "ab", 1300)
        assert not failed and cache.stats()["pages_attended"] > 0
        cache.check_integrity()
        found.append(outs)
    assert (cache.stats()["backend"], cache.stats()["seal_backend"]) == ("gluon", "triton")
    for seq_id in "ab":
        error = (found[0][seq_id] - found[1][seq_id]).norm() / found[0][seq_id].norm()
        assert float(error) < 0.05


def compiled(*kernels):
    """The number of builds of `kernels`, and whether the launch of each is built too."""
    caches = [c[0] for kernel in kernels for c in kernel.device_caches.values()]
    built = [x for found in caches for x in found.values()]
    return len(built), [x._run is not None for x in built]  # without `_run` a launch builds it


def test_after_a_warm_up_nothing_that_seals_or_rebuilds_compiles():
    cache = small_cache(device="cuda", outlier_slots=3)  # a layout that no other test seals
    kernels = (
        seal_triton._project_kernel,
        seal_triton._quantize_kernel,
        spectral_rebuild_triton._rebuild_kernel,
        exact_triton._copy_kernel,
    )
    [group] = cache.groups
    cache.sealer.warm_up(group)
    cache.attention.warm_up(group)
    before = compiled(*kernels)
    assert all(before[1])
    cache.add_sequence("a", num_prompt_tokens=1200)
    feed(cache, "a", 1300)
    assert cache.stats()["pages_sealed"] > 0 and compiled(*kernels) == before


@pytest.mark.parametrize("shape", SEAL_SHAPES)
def test_a_seal_of_more_blocks_than_a_launch_takes_compiles_nothing(shape):
    kernels = seal_triton._project_kernel, seal_triton._quantize_kernel
    seal_zeros(seal, shape, 1, device="cuda", compile_only=True)
    before = compiled(*kernels)
    assert before[0] and all(before[1])
    for blocks in (1, 3 * blocks_at_once(shape) + 2):
        assert not seal_zeros(seal, shape, blocks, device="cuda").any()
        assert compiled(*kernels) == before


def test_a_format_that_no_kernel_reads_is_refused_before_it_runs():
    format = dataclasses.replace(tiny_format("spectral-int8"), rope="pre")
    with pytest.raises(FormatError, match="rope='frame'"):
        LLM.from_model(tiny_model().cuda(), kv_format=format, kv_cache_bytes=16 << 20)


@pytest.mark.parametrize("heads, dim", [(2, 16), (8, 128), (3, 64)])
@pytest.mark.parametrize("decomposition", ["gram", "randomized"])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_gpu_bytes_do_not_depend_on_the_encoders_batch(heads, dim, decomposition, batch):
    base = PageFormat.preset("spectral-int8", num_kv_heads=heads, head_dim=dim)
    format = dataclasses.replace(base, decomposition=decomposition)
    count = 70 if batch > 1 else 5  # across a border of CUDA_BATCH, and one by one
    k, v = torch.randn(2, count, heads, 512, dim, device="cuda")
    order = torch.randperm(count, device="cuda")
    parts = zip(k[order].split(batch), v[order].split(batch))
    together = torch.cat([encode_pages(a, b, format) for a, b in parts])
    assert torch.equal(together, encode_pages(k, v, format)[order])


def test_nan_that_a_kernel_finds_is_reported_when_it_is_known():
    cache = small_cache(device="cuda")
    for s in "ab":
        cache.add_sequence(s, num_prompt_tokens=1300)
    _, failed = feed(cache, "ab", 1300, spoiled="b")  # the last step seals: nothing is known yet
    assert not failed and set(cache.settle().failed) == {"b"}
    cache.check_integrity()
