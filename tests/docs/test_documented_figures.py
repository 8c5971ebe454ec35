"""Figures in the documentation are those of the code: bytes, ratios, positions."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from spectral_paged import PageFormat
from spectral_paged.cache import Visibility
from spectral_paged.engine import DURATIONS, METRICS
from spectral_paged.models.geometry import FAMILIES
from spectral_paged.options import LLMOptions
from spectral_paged.pages import PRESETS
from support.markdown_pages import BY_NAME, ROOT, rows


@pytest.mark.parametrize("name", [n for n, p in BY_NAME.items() if "width 64 / 128 |" in p.text])
def test_ratios_of_presets_are_those_of_their_pages(name):
    said = {}
    for first, *others in rows(BY_NAME[name]):
        ratios = [cell for cell in others if re.fullmatch(r"[\d.]+x / [\d.]+x", cell)]
        preset = (re.findall(r"spectral-[\w-]+", first) or [""])[0]
        if preset and ratios:
            said[preset] = ratios[0]
    real = {}
    for preset in PRESETS[1:]:
        formats = [PageFormat.preset(preset, num_kv_heads=2, head_dim=d) for d in (64, 128)]
        real[preset] = " / ".join(f"{f.page_ratio:.2f}x" for f in formats)
    assert len(said) >= 4 and said == {preset: real[preset] for preset in said}


def test_the_page_picture_has_the_bytes_of_a_page():
    """Every section's bytes and offset, in order and without a gap but for alignment."""
    page, format = (
        BY_NAME["docs/concepts.md"],
        PageFormat.preset("spectral-quality", num_kv_heads=8, head_dim=128),
    )
    said = {
        r[0]: (int(r[1].replace(",", "")), int(r[2].replace(",", "")))
        for r in rows(page)
        if len(r) == 4 and r[1].replace(",", "").isdigit()
    }
    layout = format.layout
    real = {
        "index": layout.index_offset,
        "K band 0": layout.k.bands[0].offset,
        "K band 1": layout.k.bands[1].offset,
        "V band 0, low bits": layout.v.bands[0].offset,
        "V band 0, third bits": layout.v.bands[0].high_offset,
    }
    for side in ("K", "V"):
        for part in ("scale", "gain", "mean", "slot"):
            offset = getattr(getattr(layout, side.lower()), f"{part}_offset")
            real[f"{side} {part}{'s' * (part == 'slot')}"] = offset
    assert {name: offset for name, (_, offset) in said.items() if name != "padding"} == real
    ends = [size + offset for size, offset in said.values()]
    assert ends[:-1] == [offset for _, offset in said.values()][1:]
    assert ends[-1] == layout.head_bytes
    exact = format.exact_page_bytes(2)
    pages = Visibility.of(format).visible_blocks(1700, 0)
    held = pages * layout.page_bytes + -(-(1700 - 512 * pages) // 64) * exact
    for number in (layout.page_bytes, layout.head_bytes, exact, 2 * exact, held):
        assert f"{number:,}" in page.text
    assert f"{1700 * exact // 64 / held:.2f} times" in page.text


def test_the_drawing_is_to_scale():
    """Sections of the record in `docs/page.svg` are as wide as their bytes."""
    drawing = (ROOT / "docs" / "page.svg").read_text(encoding="utf-8")
    layout = PageFormat.preset("spectral-quality", num_kv_heads=8, head_dim=128).layout
    k, v = layout.k, layout.v
    edges = [
        k.bands[0].offset,
        k.bands[1].offset,
        k.scale_offset,
        v.bands[0].offset,
        v.bands[0].high_offset,
        v.scale_offset,
        layout.head_bytes,
    ]
    drawn = re.findall(r'class="(?:k2?|v2?|side)" x="([\d.]+)" y="\d+" width="([\d.]+)"', drawing)
    left, total = float(drawn[0][0]), sum(float(width) for _, width in drawn)
    scale = total / layout.head_bytes
    for (x, width), (start, end) in zip(drawn, pairwise(edges), strict=True):
        assert float(x) == pytest.approx(left + start * scale, abs=0.2)
        assert float(width) == pytest.approx((end - start) * scale, abs=0.2)
    for number in (layout.page_bytes, layout.head_bytes, 8 * 512 * 128 * 4):
        assert f"{number:,} bytes" in drawing or f"instead of {number:,}" in drawing


def test_positions_from_which_pages_are_seen():
    format = PageFormat.preset("spectral-quality", num_kv_heads=8, head_dim=128)
    visibility, text = Visibility.of(format), BY_NAME["docs/concepts.md"].text
    assert f"first page from position {visibility.visible_from(0)} on" in text
    assert f"the second from {visibility.visible_from(1):,} on" in text


def test_families_of_the_quickstart_are_those_that_are_served():
    text = BY_NAME["docs/quickstart.md"].text.split("## Models")[1]
    listed = text.split(", with\n")[0].replace(" and ", ", ").split(", ")
    served = {name.replace("_text", " (text)") for name in FAMILIES}
    assert {name.strip() for name in listed} == served
    table = BY_NAME["README.md"].text.split("| families |")[1].split("\n\n")[0]
    assert all(re.search(rf"\b{re.escape(name)}", table) for name in served)


def test_every_metric_is_explained():
    spans = set(BY_NAME["docs/tuning.md"].spans)
    assert {f.name for f in METRICS} | set(DURATIONS) <= spans


def test_defaults_in_the_table_of_memory_are_those_of_the_llm():
    takes = inspect.signature(LLMOptions).parameters
    said = {
        row[0].strip("`"): float(row[1].replace(",", ""))
        for row in rows(BY_NAME["docs/tuning.md"])
        if row[0].strip("`") in takes and re.fullmatch(r"[\d.,]+", row[1])
    }
    assert len(said) >= 4 and said == {name: takes[name].default for name in said}


def test_what_vllms_blocks_would_cost_follows_from_the_format():
    """One token more is stored than the query sees, in blocks that take a page's bytes each."""
    preset = PageFormat.preset("spectral-quality", num_kv_heads=8, head_dim=128)
    format = replace(preset, num_landmark_tokens=0)
    page = BY_NAME["docs/decisions/0030-no-vllm-adapter-yet.md"]
    said = [row for row in rows(page) if re.fullmatch(r"[\d,]+", row[0])]
    assert said
    for tokens, held, ours, theirs in said:
        tokens = int(tokens.replace(",", ""))
        pages = Visibility.of(format).visible_blocks(tokens, 0)
        exact = -(-(tokens + 1 - 512 * pages) // 64)
        plain = tokens * format.exact_page_bytes(2) / 64
        sizes = format.page_bytes, format.exact_page_bytes(2)
        assert held == f"{pages}, {exact}"
        assert ours == f"{plain / (pages * sizes[0] + exact * sizes[1]):.2f}x"
        assert theirs == f"{plain / ((pages + exact) * max(sizes)):.2f}x"
    for number in (*sizes, format.page_bytes):
        assert f"{number:,}" in page.text
    assert f"[blocks, 8, 1, {format.layout.head_bytes}]" in page.text
