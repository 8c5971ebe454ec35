"""`PageFormat`: bytes, presets, fingerprints and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spectral_paged.errors import FormatError
from spectral_paged.pages import PageFormat
from spectral_paged.pages.presets import REFERENCE_RANKS


def preset(name="spectral-int8", heads=2, dim=64, **kw):
    return PageFormat.preset(name, num_kv_heads=heads, head_dim=dim, **kw)


@pytest.mark.parametrize("dim", sorted(REFERENCE_RANKS))
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_page_bytes_count_every_section_and_the_padding(dim, heads):
    k_rank, v_rank = REFERENCE_RANKS[dim]
    record = 0
    for rank in (k_rank, v_rank):
        record += 512 * rank + rank * dim + 2 * rank + 2 * dim
    record = -(-record // 128) * 128
    assert preset(heads=heads, dim=dim).page_bytes == heads * record


def test_ratio_of_the_reference_format_at_width_128_is_above_four():
    assert 4.1 < preset(dim=128, heads=8).page_ratio < 4.3


SECTIONED = {
    "reference": {},
    "mixed": {"k_bands": ((16, 8), (16, 4), (16, 3), (16, 2)), "gain": True, "basis_bits": 4},
    "no-mean": {"mean": False, "scale_tokens": 64},
    "many-slots": {"outlier_slots": 60},
    "shared": {"basis": "shared", "outlier_slots": 5, "v_bands": ((32, 3),), "gain": True},
}


@pytest.mark.parametrize("changes", SECTIONED.values(), ids=SECTIONED)
@pytest.mark.parametrize("dim", sorted(REFERENCE_RANKS))
def test_sections_follow_one_another_on_sixteen_bytes(dim, changes):
    """Their sizes by the drawing; each begins where the one before ends, rounded up to 16."""
    format = replace(preset(dim=dim), **changes)
    layout, cursor = format.layout, 0
    groups = 512 // format.scale_tokens
    assert (layout.num_kv_heads, layout.head_dim) == (format.num_kv_heads, dim)
    assert (layout.rope, layout.levels) == (format.rope, format.levels)
    assert layout.num_slots == format.outlier_slots
    assert layout.k.by_component is False and layout.v.by_component is True
    for side, bands in ((layout.k, format.k_bands), (layout.v, format.v_bands)):
        assert side.scale_groups == groups
        taken, first = [], 0
        for band, (count, bits) in zip(side.bands, bands, strict=True):
            assert (band.first, band.count, band.bits) == (first, count, bits)
            first += count
            plane_bits = {8: 8, 4: 4, 3: 2, 2: 2}[bits]
            taken.append((band.offset, 512 * count * plane_bits // 8))
            taken.append((band.high_offset, 512 * count // 8 if bits == 3 else None))
            row_bits = 4 if bits < 8 and format.basis_bits == 4 else 8
            assert band.basis_bits == row_bits
            size = count * dim * row_bits // 8 if format.basis == "page" else None
            taken.append((band.basis_offset, size))
        assert side.rank == first
        taken += [
            (side.scale_offset, 2 * groups * side.rank),
            (side.gain_offset, 512 if format.gain else None),
            (side.mean_offset, 2 * dim if format.mean else None),
            (side.slot_offset, 2 * dim * format.outlier_slots or None),
        ]
        for offset, size in taken:
            if size is None:
                assert offset == -1
                continue
            assert offset == cursor and offset % 16 == 0 and isinstance(offset, int)
            cursor = -(-(offset + size) // 16) * 16
    assert layout.index_offset == cursor
    assert layout.head_bytes == -(-(cursor + 2 * format.outlier_slots) // 128) * 128
    assert format.page_bytes == format.num_kv_heads * layout.head_bytes


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"num_kv_heads": 0}, "^num_kv_heads is 0; it must be at least 1$"),
        ({"k_bands": ((80, 8),)}, "^k_bands has rank 80 but head_dim is 64"),
        ({"k_bands": ((24, 8),)}, "multiples of 16"),
        ({"k_bands": ((16, 5),)}, "5-bit"),
        ({"v_bands": ()}, "^k_bands and v_bands must both be empty"),
        ({"num_landmark_tokens": 65}, "^num_landmark_tokens is 65; .*use 128"),
        ({"num_landmark_tokens": -64}, "use 0"),
        ({"hot_tokens": 10}, "^hot_tokens is 10; .*multiple of 64"),
        ({"prefill_segment": 64}, "^prefill_segment is 64; .*at least 512"),
        ({"head_dim": 40}, "multiple of 16"),
        ({"head_dim": 272}, "between 16 and 256"),
        ({"head_dim": 0}, "between 16 and 256"),
        ({"k_bands": ((16, 3.5),)}, "3.5-bit"),
        ({"k_bands": ((16, 1),)}, "1-bit"),
        ({"k_bands": ((0, 8),)}, "band of 0"),
        ({"v_bands": ((32, 4), (48, 2))}, "v_bands has rank 80 but head_dim is 64"),
        ({"basis": "global"}, "'page' or 'shared'"),
        ({"rope": "none"}, "'pre' or 'frame' or 'post'"),
        ({"levels": "nf4"}, "'gaussian' or 'uniform'"),
        ({"basis_bits": 3}, "basis_bits is 3; use 8 or 4"),
        ({"decomposition": "svd"}, "'gram' or 'randomized'"),
        ({"dim_weighting": "query-energy"}, "'none' or 'diagonal' or 'calibrated'"),
        ({"scale_tokens": 100}, "use 64, 128, 256 or 512"),
        ({"scale_tokens": 32}, "use 64, 128, 256 or 512"),
        ({"outlier_slots": 65}, "0 to 64"),
        ({"outlier_slots": -1}, "0 to 64"),
        ({"basis_id": "0123456789abcdef"}, "^basis_id names .* uses none$"),
    ],
)
def test_values_outside_the_contract_are_refused_with_the_remedy(changes, says):
    fields = {
        "name": "x",
        "num_kv_heads": 2,
        "head_dim": 64,
        "k_bands": ((16, 8),),
        "v_bands": ((32, 8),),
    } | changes
    with pytest.raises(FormatError, match=says):
        PageFormat(**fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 16, "v_bands": ((16, 8),)},
        {"head_dim": 256},
        {"scale_tokens": 64},
        {"scale_tokens": 128},
        {"scale_tokens": 256},
        {"outlier_slots": 64},
        {"num_kv_heads": 1},
        {"num_landmark_tokens": 0, "hot_tokens": 0, "prefill_segment": 512},
    ],
)
def test_values_at_the_limits_are_taken(changes):
    fields = {
        "name": "x",
        "num_kv_heads": 2,
        "head_dim": 64,
        "k_bands": ((16, 8),),
        "v_bands": ((32, 8),),
    } | changes
    format = PageFormat(**fields)
    assert {name: getattr(format, name) for name in changes} == changes


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(FormatError, match="spectral-int8-post"):
        preset("int3")


@pytest.mark.parametrize(
    "name, fingerprint",
    [
        ("spectral-int8", "7594bb8a66598280"),
        ("spectral-int8-post", "a0fff31f0151c35d"),
        ("spectral-page", "e2556fd2cf9ace81"),
        ("spectral-quality", "3702563f58204ae7"),
        ("spectral-compact", "c6f37655a22b6b29"),
    ],
)
def test_presets_keep_the_fingerprints_that_results_name(name, fingerprint):
    assert preset(name).fingerprint == fingerprint


def test_fingerprint_changes_with_meaning_and_not_with_the_name():
    base = preset()
    assert base.fingerprint != preset(prefill_segment=512).fingerprint
    assert base.fingerprint != preset("spectral-int8-post").fingerprint
    renamed = replace(base, name="another")
    assert renamed.name != base.name
    assert renamed.fingerprint == base.fingerprint


def test_exact_has_no_pages():
    fmt = preset("exact")
    assert fmt.page_bytes == 0 and fmt.page_ratio == 1.0
