"""Texts, windows and facts of `bench quality` are complete and lie at their intended places."""

from __future__ import annotations

import random

import pytest

from spectral_paged.benchmarks.quality import tasks, texts
from spectral_paged.benchmarks.quality.tasks import HOT, LANDMARKS
from spectral_paged.errors import InvalidRequestError
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from support.copying_replay import haystack


def test_every_machine_has_judged_texts_of_two_genres_at_least():
    found = texts.by_genre(texts.judged_texts())
    assert {"code", "reference"} <= set(found) <= {"fiction", "code", "reference", "legal"}
    assert all(len(t.text) > 1000 and len(t.sha256) == 64 for ts in found.values() for t in ts)


def test_calibration_texts_are_never_judged():
    judged = {t.sha256 for t in texts.judged_texts()}
    calibration = texts.calibration_texts()
    assert calibration
    assert not judged & {t.sha256 for t in calibration}


def test_named_texts_carry_their_genre(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("Rose is a rose.")
    assert texts.judged_texts([str(file), f"verse={file}"]) == [
        texts.Text("given", "poem.txt", "Rose is a rose."),
        texts.Text("verse", "poem.txt", "Rose is a rose."),
    ]
    with pytest.raises(InvalidRequestError, match="GENRE=FILE"):
        texts.judged_texts(["verse=missing.txt"])


def test_a_hub_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    found, notes = texts.hub_texts()
    assert found == []
    assert len(notes) == len(texts.HUB_SETS) and all("not run" in n for n in notes)


def test_contexts_end_with_the_hot_window():
    hay = haystack(max_tokens=2048)
    assert hay.sealed_length(1024) == LANDMARKS + 2 * BLOCK_TOKENS + HOT
    assert hay.sealed_length(2048) == LANDMARKS + 3 * BLOCK_TOKENS + HOT  # room for a question
    for length in (511, 4096):
        with pytest.raises(InvalidRequestError, match="cannot be judged"):
            hay.sealed_length(length)


def test_windows_share_genres_evenly_and_follow_their_text():
    hay = haystack()
    windows = tasks.continuation_windows(hay, 1024, count=5, num_continuation=32)
    assert [w.genre for w in windows] == ["fiction"] * 3 + ["code"] * 2
    assert len({(w.genre, w.start) for w in windows}) == 5
    for w in windows:
        assert w.context[0] == 0
        assert len(w.context) == 1152 and len(w.continuation) == 33
        body = w.context[1:] + w.continuation
        assert list(body) == hay.ids(w.genre)[w.start : w.start + len(body)]


def test_texts_too_short_for_a_window_are_left_out_or_refused():
    hay = haystack(num_chars=800)
    with pytest.raises(InvalidRequestError, match="name one"):
        tasks.continuation_windows(hay, 1024)


def all_probes(hay):
    for round in range(4):
        yield from tasks.needle_probes(hay, (1024, 2048), round)
        yield from tasks.task_probes(hay, (1024, 2048), round)


def test_facts_lie_in_sealed_blocks_and_nowhere_else():
    hay = haystack()
    for probe in all_probes(hay):
        text = hay.tokenizer.decode(probe.context)
        assert len(probe.context) == hay.sealed_length(probe.length)
        for q in probe.questions:
            assert LANDMARKS <= q.start < q.end <= len(probe.context) - HOT, probe.name
            assert q.answer in text[q.start : q.end]
            assert "Question" not in text and "Recall" not in text


def test_answers_of_one_context_are_unambiguous():
    for probe in all_probes(haystack()):
        prompts = [q.prompt for q in probe.questions]
        assert len(set(prompts)) == len(prompts)
        assert len(probe.questions) == {"needle-8": 8, "needle-1": 1}.get(
            probe.family, len(prompts)
        )


def test_the_prompt_repeats_the_fact_word_by_word_up_to_the_answer():
    for style in set(tasks.STYLES):
        for fact in tasks.needle_facts(style, 8, random.Random(1)):
            assert fact.statement == f"{fact.prompt} {fact.answer}."


def test_the_same_seed_gives_the_same_probes_and_another_does_not():
    one, two, other = (list(tasks.needle_probes(haystack(), [1024], 1, seed=s)) for s in (0, 0, 1))
    assert one == two
    assert one != other


def test_single_needles_visit_every_depth():
    hay = haystack()
    probes = [p for r in range(8) for p in tasks.needle_probes(hay, [2048], r)]
    depths = {p.questions[0].depth for p in probes if p.family == "needle-1"}
    assert len(depths) == 8


def test_generation_prompts_have_exactly_the_length_asked():
    prompts = list(tasks.generation_prompts(haystack(), (500, 1500), per_length=2))
    assert [len(p.context) for p in prompts] == [500, 500, 1500, 1500]
