"""PageFormat: bytes, visibility rule, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_paged.errors import FormatError
from spectral_paged.page_format import REFERENCE_RANKS, PageFormat


def preset(name="spectral-int8", heads=2, dim=64, **kw):
    return PageFormat.preset(name, num_kv_heads=heads, head_dim=dim, **kw)


@pytest.mark.parametrize("dim", sorted(REFERENCE_RANKS))
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_page_bytes_count_every_section_and_the_padding(dim, heads):
    k_rank, v_rank = REFERENCE_RANKS[dim]
    record = 0
    for rank in (k_rank, v_rank):
        record += 512 * rank + rank * dim + 4 * rank + 2 * dim
    record = -(-record // 128) * 128
    assert preset(heads=heads, dim=dim).page_bytes == heads * record


def test_ratio_of_the_reference_format_at_width_128_is_above_four():
    assert 4.1 < preset(dim=128, heads=8).page_ratio < 4.3


@pytest.mark.parametrize("dim", sorted(REFERENCE_RANKS))
def test_sections_are_aligned_and_do_not_overlap(dim):
    layout = preset(dim=dim).layout
    cursor = 0
    for side in (layout.k, layout.v):
        for offset, size, step in (
            (side.coeff_offset, 512 * side.rank, 16),
            (side.basis_offset, side.rank * dim, 16),
            (side.scale_offset, 4 * side.rank, 16),
            (side.mean_offset, 2 * dim, 16),
        ):
            assert offset % step == 0 and offset >= cursor
            cursor = offset + size
    assert cursor <= layout.head_bytes and layout.head_bytes % 128 == 0


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"k_bands": ((80, 8),)}, "rank 80 but head_dim is 64"),
        ({"k_bands": ((24, 8),)}, "multiples of 16"),
        ({"k_bands": ((16, 5),)}, "5-bit"),
        ({"v_bands": ()}, "both"),
        ({"num_landmark_tokens": 65}, "use 128"),
        ({"num_landmark_tokens": -64}, "use 0"),
        ({"hot_tokens": 10}, "multiple of 64"),
        ({"prefill_segment": 0}, "at least 512"),
        ({"head_dim": 40}, "multiple of 16"),
        ({"basis": "shared"}, "not in this version"),
    ],
)
def test_values_outside_the_contract_are_refused_with_the_remedy(changes, says):
    fields = {
        "name": "x", "num_kv_heads": 2, "head_dim": 64, "k_bands": ((16, 8),), "v_bands": ((32, 8),)
    } | changes
    with pytest.raises(FormatError, match=says):
        PageFormat(**fields)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(FormatError, match="spectral-int8-post"):
        preset("int3")


def test_fingerprint_changes_with_meaning_and_not_with_the_name():
    base = preset()
    assert base.fingerprint != preset(prefill_segment=512).fingerprint
    assert base.fingerprint != preset("spectral-int8-post").fingerprint
    renamed = base.with_ranks(base.k_rank, base.v_rank)
    assert renamed.name != base.name
    assert renamed.fingerprint == base.fingerprint


@given(
    position=st.integers(0, 9000),
    prompt=st.integers(1, 9000),
    landmarks=st.sampled_from([0, 64, 128]),
    hot=st.sampled_from([0, 64, 128]),
    segment=st.sampled_from([512, 2048, 8192]),
)
def test_visibility_is_the_written_rule(position, prompt, landmarks, hot, segment):
    fmt = PageFormat(
        "x", 1, 64, ((16, 8),), ((32, 8),),
        num_landmark_tokens=landmarks, hot_tokens=hot, prefill_segment=segment,
    )
    if position >= prompt:
        s = position
    elif position < landmarks:
        s = 0
    else:
        s = landmarks + (position - landmarks) // segment * segment
    expected = sum(s >= landmarks + 512 * (b + 1) + hot for b in range(20))
    assert fmt.visible_blocks(position, prompt) == expected


@given(
    start=st.integers(0, 5000),
    prompt=st.integers(1, 5000),
    hot=st.sampled_from([0, 64]),
    segment=st.sampled_from([512, 2048]),
)
def test_a_chunk_ends_exactly_where_the_view_changes(start, prompt, hot, segment):
    fmt = PageFormat(
        "x", 1, 64, ((16, 8),), ((32, 8),), hot_tokens=hot, prefill_segment=segment
    )
    end = fmt.chunk_end(start, prompt)
    assert end > start
    here = fmt.visible_blocks(start, prompt)
    probes = {start, end - 1, *range(start, min(end, start + 9000), 61)}
    assert all(fmt.visible_blocks(t, prompt) == here for t in probes)
    assert fmt.visible_blocks(end, prompt) != here


def test_exact_never_sees_a_page():
    fmt = preset("exact")
    assert fmt.visible_blocks(10**6, 10) == 0 and fmt.page_bytes == 0 and fmt.page_ratio == 1.0
