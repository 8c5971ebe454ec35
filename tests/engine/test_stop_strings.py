"""Stop strings are found where the text has them, and what may begin one is held back."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings, strategies as st

from spectral_paged.engine.stop_strings import StopStrings
from spectral_paged.engine.text import OutputText
from spectral_paged.engine.token_bytes import TokenBytes
from support.small_tokenizers import byte_level

WORDS = st.text("ab", min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(stops=st.lists(WORDS, min_size=1, max_size=5), pieces=st.lists(st.text("abc", max_size=4)))
def test_pieces_complete_what_the_whole_text_has(stops, pieces):
    automaton, state, text = StopStrings(stops), 0, ""
    for piece in pieces:
        before, text = len(text), text + piece
        state, found = automaton.feed(state, piece)
        assert sorted((before + at, stop) for at, stop in found) == sorted(
            (at, stop)
            for stop in set(stops)
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > before
        )
        begun = [n for s in stops for n in range(len(s)) if text.endswith(s[:n])]
        assert automaton.held(state) == max(begun), "no more is held than may yet be removed"


@pytest.mark.parametrize("letters", ["a", "ab", "end of text "])
def test_a_token_costs_microseconds_whatever_the_stops_are(letters):
    """16 stops of 256 characters that share their beginnings, in a text that begins them anew."""
    stops = [(letters * 256)[: 255 - i] + "!" for i in range(16)]
    tokenizer = byte_level()
    out = OutputText(TokenBytes(tokenizer), stop=stops)
    ids = tokenizer.encode(letters * (4000 // len(letters)))
    for token in ids[:300]:
        out.append(token)
    begin = time.perf_counter()
    for token in ids[300:]:
        out.append(token)
        out.settled()
    assert (time.perf_counter() - begin) / len(ids[300:]) < 1e-4
    begun = max(n for s in stops for n in range(len(s)) if out.text.endswith(s[:n]))
    assert begun > 240 and out.settled() == out.text[:-begun]
