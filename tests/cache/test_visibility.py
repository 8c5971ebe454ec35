"""The blocks that a query sees as pages, and the token at which a step must end."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from spectral_paged.cache import Visibility
from spectral_paged.pages import PageFormat


def preset(name="spectral-int8", **kw):
    return PageFormat.preset(name, num_kv_heads=2, head_dim=64, **kw)


def page_format(**fields):
    return PageFormat("x", 1, 64, ((16, 8),), ((32, 8),), **fields)


@given(
    position=st.integers(0, 9000),
    prompt=st.integers(1, 9000),
    landmarks=st.sampled_from([0, 64, 128]),
    hot=st.sampled_from([0, 64, 128]),
    segment=st.sampled_from([512, 2048, 8192]),
)
def test_visibility_is_the_written_rule(position, prompt, landmarks, hot, segment):
    fmt = page_format(num_landmark_tokens=landmarks, hot_tokens=hot, prefill_segment=segment)
    if position >= prompt:
        s = position
    elif position < landmarks:
        s = 0
    else:
        s = landmarks + (position - landmarks) // segment * segment
    expected = sum(s >= landmarks + 512 * (b + 1) + hot for b in range(20))
    assert Visibility.of(fmt).visible_blocks(position, prompt) == expected


@given(
    start=st.integers(0, 5000),
    prompt=st.integers(1, 5000),
    hot=st.sampled_from([0, 64]),
    segment=st.sampled_from([512, 2048]),
)
def test_a_chunk_ends_exactly_where_the_view_changes(start, prompt, hot, segment):
    fmt = page_format(hot_tokens=hot, prefill_segment=segment)
    seen = Visibility.of(fmt)
    end = seen.chunk_end(start, prompt)
    assert end > start
    here = seen.visible_blocks(start, prompt)
    probes = {start, end - 1, *range(start, min(end, start + 9000), 61)}
    assert all(seen.visible_blocks(t, prompt) == here for t in probes)
    assert seen.visible_blocks(end, prompt) != here


@pytest.mark.parametrize("landmarks", [0, 64])
@pytest.mark.parametrize("hot", [0, 64])
def test_a_chunk_that_starts_anywhere_ends_where_the_view_changes(landmarks, hot):
    fmt = page_format(num_landmark_tokens=landmarks, hot_tokens=hot, prefill_segment=512)
    seen = Visibility.of(fmt)
    for prompt in (1, 700, 1700, 5000):
        views = [seen.visible_blocks(t, prompt) for t in range(4000)]
        for start in range(0, 2600, 3):
            end = next(t for t in range(start, 4000) if views[t] != views[start])
            assert seen.chunk_end(start, prompt) == end, (start, prompt)


def test_where_each_step_is_a_segment_a_step_has_no_end():
    """And its queries see what the step's first position sees, prompt or not."""
    fmt = preset(prefill_segment=0)
    seen = Visibility.of(fmt)
    for start in (0, 64, 639, 640, 1151, 1152, 5000):
        assert seen.chunk_end(start, 3000) > 10**9
        assert seen.visible_blocks(start, 3000) == seen.visible_blocks(start, 0)
    assert seen.visible_blocks(640, 3000) == 1
    assert fmt.fingerprint != preset(prefill_segment=2048).fingerprint


def test_exact_never_sees_a_page():
    seen = Visibility.of(preset("exact"))
    assert seen.chunk_end(0, 10) > 10**9
    assert seen.visible_blocks(10**6, 10) == 0
