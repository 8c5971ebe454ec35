"""GPU kernels in Triton's interpreter, against their torch twins."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.kernels.decode import gpu as spectral_decode_gpu
from spectral_paged.kernels.decode.gpu import decode_attention, spectral_decode
from spectral_paged.kernels.decode.reference import (
    decode_attention as attend_twin,
    spectral_decode as twin,
)
from spectral_paged.kernels.decode.triton.exact import exact_decode
from spectral_paged.kernels.exact.triton import exact_append, exact_copy
from spectral_paged.kernels.launch.configs import DecodeConfig
from spectral_paged.kernels.page.triton import check_layout
from spectral_paged.kernels.page.view import side_view
from spectral_paged.kernels.rebuild.triton import spectral_rebuild
from spectral_paged.pages import PageFormat
from support.kernel_cases import (
    MILD,
    PAGES,
    append_both,
    attend,
    attend_case,
    attend_error,
    captured_case,
    copy_both,
    exact_case,
    exact_error,
    page_case,
    page_error,
    placed_pages,
    rebuild_error,
    some_sinks,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter; test_gpu runs these on the GPU"
)


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_read_as_the_twin_reads_them(name):
    args, options = page_case(name)
    assert page_error(spectral_decode, args, options) < 2e-3


@pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
@pytest.mark.parametrize("name", ["quality-64", "int8-post-64"])
def test_any_number_of_queries_may_share_a_kv_head(name, group):
    args, options = page_case(name, heads=2, group=group, counts=(1, 2))
    assert page_error(spectral_decode, args, options) < 2e-3


@pytest.mark.parametrize("name", ["quality-64", "int8-post-64"])
def test_the_number_of_splits_changes_nothing_that_shows(name):
    args, options = page_case(name, counts=(5, 0, 3, 1))
    whole = spectral_decode(*args, **options)
    for target in (1, 2, 64):
        split = spectral_decode(*args, **options, config=DecodeConfig(programs=target))
        for x, y in zip(split, whole):
            assert torch.allclose(x, y, rtol=1e-3, atol=1e-3, equal_nan=True), target


def test_the_same_call_gives_the_same_bits():
    args, options = page_case("quality-64", counts=(2, 3))
    first, second = (spectral_decode(*args, **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("scale", [5.0, -5.0])
def test_scores_of_several_hundred_do_not_overflow(scale):
    args, options = page_case("quality-64", counts=(2,), scale=scale)
    assert page_error(spectral_decode, args, options) < 2e-2  # a softmax of one token


@pytest.mark.parametrize("name", ["quality-64", "int8-post-64", "slots-without-gain"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("hidden", [None, (0, 800, 10_000), (64 + 7, 64 + 512, 64 + 1535)])
def test_scores_are_capped_and_windows_hide_what_lies_before_them(name, softcap, hidden):
    """Windows that hide nothing, part of a page, whole pages, and all of a sequence."""
    args, options = page_case(name, counts=(1, 3, 2))
    visible = None if hidden is None else torch.tensor(hidden)
    scores = {"softcap": softcap, "first_visible": visible}
    assert page_error(spectral_decode, args, options, scores=scores) < 2e-3


@pytest.mark.parametrize("name", ["quality-128", "compact-128", "int8-128"])
def test_biased_keys_of_a_real_model_are_read_to_the_twins_precision(name):
    args, options = captured_case(name)
    assert page_error(spectral_decode, args, options) < 1e-3


@pytest.mark.parametrize("power", [-20, 20])
def test_values_of_any_size_are_read(power):
    """Coefficients of V past what fp16 holds."""
    (q, plane, table, counts), options = page_case("quality-64", counts=(1, 2))
    layout = options["layout"]
    units = plane.view(-1, layout.page_bytes)
    view = side_view(units, layout, "v")
    view.scale.copy_((view.scale.float() * 2.0**power).bfloat16())
    args = (q, plane, table, counts)
    assert page_error(spectral_decode, args, options) < 2e-3


@pytest.mark.parametrize(
    "name, parts",
    [
        ("quality-128", "gluon"),
        ("int8-128", "gluon"),
        ("int8-two-bands", "gluon and triton"),
        ("many-bands", "triton"),
        ("wide-256", "triton"),
    ],
)
def test_what_reads_pages_is_named_part_by_part(name, parts, monkeypatch):
    """Basis rows of a second band lie behind its codes, where the explicit kernel never looks."""
    monkeypatch.setattr(spectral_decode_gpu, "has_tensor_cores", lambda device: True)
    layout = PageFormat(name, 1, PAGES[name][0], **PAGES[name][1]).layout
    assert spectral_decode_gpu.implementation(layout, 4, torch.device("cuda")) == parts


def test_a_cap_of_zero_is_refused():
    args, options = page_case("quality-64", counts=(1,))
    for op in (spectral_decode, twin):
        with pytest.raises(ValueError, match="softcap is 0"):
            op(*args, **options, softcap=0.0)


def test_partly_rotated_heads_are_read():
    args, options = page_case("quality-64", counts=(2, 1))
    options |= {name: options[name][:, :16].contiguous() for name in ("cos", "sin")}
    assert page_error(spectral_decode, args, options) < 2e-3


@pytest.mark.parametrize("landmarks", [0, 128])
def test_frames_count_from_the_landmarks(landmarks):
    args, options = page_case("quality-64", counts=(2, 1), landmarks=landmarks)
    assert page_error(spectral_decode, args, options) < 2e-3


def test_layouts_that_no_kernel_reads_are_refused_with_what_to_use():
    bands = {"k_bands": ((16, 8),), "v_bands": ((16, 8),)}
    with pytest.raises(ValueError, match="rope='frame'"):
        check_layout(PageFormat("t", 1, 64, rope="pre", **bands).layout)
    with pytest.raises(ValueError, match="scale_tokens=512"):
        check_layout(PageFormat("t", 1, 64, rope="post", scale_tokens=64, **bands).layout)


def test_more_queries_than_a_kernel_takes_are_refused():
    args, options = page_case("int8-post-64", group=17, counts=(1,))
    with pytest.raises(ValueError, match="17 query heads"):
        spectral_decode(*args, **options)


@pytest.mark.parametrize("name", PAGES)
def test_history_is_rebuilt_as_the_twin_rebuilds_it(name):
    """Of several KV heads in one format: where a head's bytes lie, its views say for all."""
    args, options = page_case(name, heads=2 if name == "quality-64" else 1)
    assert rebuild_error(spectral_rebuild, args, options) < 1e-5


@pytest.mark.parametrize("name", ["quality-64", "int8-post-64"])
def test_pages_of_several_sequences_are_rebuilt_where_they_belong(name):
    args, options = page_case(name, heads=2, counts=(3, 4))
    got, want = placed_pages(spectral_rebuild, args, options, dtype=torch.float32)
    assert torch.equal(got, want)


def test_keys_before_rope_are_rebuilt_too(monkeypatch):
    dim, fields = PAGES["many-bands"]
    monkeypatch.setitem(PAGES, "many-bands", (dim, {**fields, "rope": "pre"}))
    args, options = page_case("many-bands", heads=2, landmarks=128)
    assert rebuild_error(spectral_rebuild, args, options) < 1e-5


def test_a_sequence_of_blocks_held_exactly_has_no_history():
    args, options = page_case("quality-64")
    del options["scale"]
    k, v = spectral_rebuild(
        args[1], torch.full((2,), -1, dtype=torch.int32), dtype=torch.float32, **options
    )
    assert k.shape == v.shape == (1, 0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 24, 96])
def test_exact_pages_are_copied_as_the_twin_copies_them(dtype, dim):
    want, got = copy_both(exact_copy, dtype=dtype, dim=dim)
    assert torch.equal(got, want)


# ---- exact pages and merging -------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 7, 8, 16])
@pytest.mark.parametrize("dim", [16, 64, 96])
def test_exact_pages_are_read_as_the_twin_reads_them(group, dim):
    args, options = exact_case([1, 63, 64, 0, 65, 300], group=group, dim=dim)
    assert exact_error(exact_decode, args, options) < 1e-4


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("hidden", [None, (0, 64, 65, 0, 300)])
def test_scores_of_exact_pages_are_capped_and_hidden(softcap, hidden):
    args, options = exact_case([1, 65, 130, 0, 300])
    options |= {
        "softcap": softcap,
        "first_visible": None if hidden is None else torch.tensor(hidden),
    }
    assert exact_error(exact_decode, args, options) < 1e-4


def test_half_precision_pages_are_read_to_their_precision():
    args, options = exact_case([130, 511, 513], dtype=torch.float16)
    assert exact_error(exact_decode, args, options) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_append_writes_the_bytes_that_the_twin_writes(dtype):
    want, got = append_both(exact_append, dtype=dtype)
    assert torch.equal(got, want)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("name", ["quality-64", "slots-without-gain", "int8-post-64"])
def test_landmarks_pages_and_tail_are_one_softmax(name, group):
    args, options = attend_case(name, (0, 3, 1, 0), (70, 0, 130, 0), group=group)
    assert attend_error(decode_attention, args, options) < 2e-3
    args = (*args[:4], None, args[5] * 0)
    assert attend_error(decode_attention, args, options) < 1e-4


def test_attention_to_all_tiers_has_the_dtype_of_its_queries():
    args, options = attend_case("quality-64", (1, 2), (65, 1), dtype=torch.float16)
    args = (args[0].half(), *args[1:])
    assert attend_error(decode_attention, args, options) < 1e-2


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["quality-64", "int8-post-64"])
def test_a_window_over_all_tiers_hides_what_lies_before_it(name, softcap):
    """Of five sequences: all seen, a part of the pages, a part of the tail, all pages hidden, and
    pages gone (holes)."""
    args, options = attend_case(name, (1, 2, 1, 2, 2), (70, 70, 130, 64, 100))
    args[4][4, 0] = -1
    hidden = torch.tensor([0, 64, 100, 60, 64], dtype=torch.int32)
    visible = torch.tensor([0, 700, 2000, 5000, 600], dtype=torch.int32)
    scores = {"softcap": softcap, "first_exact": hidden, "first_visible": visible}
    assert attend_error(decode_attention, args, options | scores) < 2e-3
    seen, whole = (attend(attend_twin, args, o) for o in (options | scores, options))
    assert not torch.allclose(seen[1:], whole[1:], atol=1e-2)


@pytest.mark.parametrize(
    "name, group, dtype",
    [
        ("quality-64", 5, torch.float32),
        ("int8-post-64", 1, torch.bfloat16),
        ("int8-post-64", 5, torch.float32),
    ],
)
def test_a_sink_takes_its_part_of_a_softmax_over_all_tiers(name, group, dtype):
    """Of pages and exact tokens, of either alone, and of a sequence without tokens."""
    args, options = attend_case(name, (0, 3, 1, 0), (70, 0, 130, 0), group=group)
    options = options | MILD | {"sinks": some_sinks(2 * group, dtype)}
    assert attend_error(decode_attention, args, options) < 2e-3
    args = (*args[:4], None, args[5] * 0)
    assert attend_error(decode_attention, args, options) < 1e-4
    with_sinks, without = (
        attend(decode_attention, args, o) for o in (options, options | {"sinks": None})
    )
    assert torch.equal(with_sinks[:, 0], without[:, 0]), "the first sink takes nothing"
    parts = (with_sinks[2] / without[2])[:, 0]
    assert 0.01 < float(parts[1]) < 0.99, "the second takes a part"
    assert group == 1 or not with_sinks[:, 2].any(), "the third takes all"


def test_pages_of_layers_without_rotation_need_no_table():
    args, options = attend_case("int8-post-64", (1, 2), (65, 1))
    none = torch.zeros(0, 0)
    assert attend_error(decode_attention, args, options | {"cos": none, "sin": none}) < 2e-3
