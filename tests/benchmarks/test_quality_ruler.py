"""RULER's task kinds can be solved from their contexts, fill them, and are scored as RULER does."""

from __future__ import annotations

import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from spectral_paged.benchmarks.quality import ruler, texts
from spectral_paged.benchmarks.quality.journal import Journal
from spectral_paged.benchmarks.quality.ruler_tasks import (
    KINDS,
    QUESTION_TOKENS,
    match_all,
    match_part,
    ruler_task,
)
from spectral_paged.benchmarks.quality.sections import ruler as ruler_sections
from spectral_paged.benchmarks.quality.summary import ruler_summary
from spectral_paged.benchmarks.quality.tasks import Haystack
from spectral_paged.errors import InvalidRequestError
from support.copying_replay import HARD, MILD, Characters, CopyingReplay, quiet

LENGTH = 8192


def essays(num_words=6000):
    """A haystack of made-up words in sentences, which is rich enough for `cwe`."""
    rng = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randrange(4, 9))) for _ in range(num_words)]
    body = " ".join(w + "." * (i % 9 == 8) for i, w in enumerate(words))
    return Haystack([texts.Text("fiction", "essay", body)], Characters(), 40_000)


HAY = essays()


def solve(context, prompt):
    """The answer that the text of a context gives to a question, by reading alone."""
    if "special magic" in prompt:
        told = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+?)\.(?=\s|$)", context)
        asked = re.search(r"for (.*) mentioned in the provided text\?", prompt)[1]
        keys = asked.replace(", and ", ", ").split(", ")
        return " ".join(value for key, value in told if key in keys)
    if "variable assignment" in prompt:
        value = re.search(r"assigned the value (\d+)", prompt)[1]
        known = {value}
        for name, of in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context):
            known |= {name} if of in known else set()
        return " ".join(sorted(known - {value}))
    if "most common words" in prompt:
        last = context[context.rindex("Below is a numbered list") :]
        common = Counter(re.findall(r"\d+\. (\w+)", last)).most_common(10)
        return " ".join(word for word, _ in common)
    if "coded text" in prompt:
        words = context.split("coded words. ")[1].split()
        counts = Counter(w for w in words if w != "....").most_common(4)
        assert counts[2][1] > counts[3][1], "the third word is one of several"
        return " ".join(word for word, _ in counts[:3])
    if found := re.search(r"Who founded (.*)\?", prompt):
        return re.search(rf"\n{found[1]} is .*? by ([\w ]+),", context)[1]
    bridge = re.search(r"builder of (the .*) born", prompt)[1].replace("the", "The", 1)
    builder = re.search(rf"{bridge} is .*? built by ([\w ]+) and", context)[1]
    return re.search(rf"\n{builder} was born in (\w+)", context)[1]


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_question_is_answered_by_the_context_and_by_nothing_else(kind, sample):
    task = ruler_task(kind, HAY, LENGTH, sample)
    for question in task.questions:
        found = solve(task.context, question.prompt)
        assert KINDS[kind].score(found, question.answers) == 1.0
        assert KINDS[kind].score(question.prompt, question.answers) == 0.0
        # the example before a list asks in the same words
        assert task.context.count(question.prompt.strip()) == (kind == "cwe")


@pytest.mark.parametrize("length", [LENGTH, 3 * LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_a_context_is_as_long_as_asked(kind, length):
    task = ruler_task(kind, HAY, length, 0)
    room = HAY.sealed_length(length)
    tokens = len(HAY.prefix) + len(HAY.encode(task.context))
    assert 0.95 * room <= tokens <= room
    longest = max(len(q.prompt) for q in task.questions)
    assert longest < 500 and len(task.questions) in (1, 2, 3, 4)


def test_the_thirteen_kinds_are_rulers():
    assert len(KINDS) == 13
    asked = {k: len(ruler_task(k, HAY, LENGTH, 0).questions[0].answers) for k in KINDS}
    assert asked == {
        **{f"niah_single_{i}": 1 for i in (1, 2, 3)},
        **{f"niah_multikey_{i}": 1 for i in (1, 2, 3)},
        "niah_multivalue": 4,
        "niah_multiquery": 4,
        "vt": 5,
        "cwe": 10,
        "fwe": 3,
        "qa_1": 1,
        "qa_2": 1,
    }
    tokens = {k: kind.max_tokens for k, kind in KINDS.items()}
    assert {tokens[k] for k in KINDS if k.startswith("niah")} == {128}
    assert [tokens[k] for k in ("vt", "cwe", "fwe", "qa_1", "qa_2")] == [30, 120, 50, 32, 32]


def test_samples_differ_and_are_the_same_again():
    for kind in KINDS:
        one, again, other = (ruler_task(kind, HAY, LENGTH, s) for s in (0, 0, 1))
        assert one == again and one != other


def test_needles_lie_anywhere():
    places = []
    for sample in range(12):
        text = ruler_task("niah_single_2", HAY, LENGTH, sample).context
        places.append(text.index("One of the special") / len(text))
    assert min(places) < 0.3 and max(places) > 0.7


def test_scores_are_shares_of_the_answers_or_any_of_them():
    assert match_all("it is Alpha and BETA", ["alpha", "beta", "gamma", "delta"]) == 0.5
    assert match_all("", ["a"]) == 0.0
    assert match_part("Born in OSLO.", ["Oslo", "Lima"]) == 1.0
    assert match_part("Paris", ["Oslo", "Lima"]) == 0.0
    assert {k for k, kind in KINDS.items() if kind.score is match_part} == {"qa_1", "qa_2"}


def test_a_kind_that_does_not_fit_is_refused_by_name():
    with pytest.raises(InvalidRequestError, match="cwe has no task of 1024 tokens"):
        ruler_task("cwe", HAY, 1024, 0)
    with pytest.raises(InvalidRequestError, match=r"cwe wants \d+ different words, .* give more"):
        ruler_task("cwe", essays(num_words=60), LENGTH, 0)


def test_texts_with_just_enough_words_are_enough():
    """A search for the length asks for few more words than the longest task has."""
    words = len(re.findall(r"\d+\. ", ruler_task("cwe", HAY, LENGTH, 0).context))
    different = 10 + (words - 300 - 40) // 3 + 20
    hay = essays(num_words=round(1.15 * different))
    assert len(ruler_task("cwe", hay, LENGTH, 0).context) > 0.9 * hay.sealed_length(LENGTH)


def test_the_question_has_room_below_the_models_limit():
    hay = Haystack(HAY.texts, Characters(), LENGTH)
    context = ruler_task("qa_1", hay, LENGTH, 0).context
    assert len(hay.prefix) + len(context) + QUESTION_TOKENS <= LENGTH


# ---- judging -----------------------------------------------------------------------------


class Reader(CopyingReplay):
    """A replay that answers by reading, and says nothing over a damaged context."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def generate(self, context, prompts, max_tokens, eos=None):
        self.batches.append(len(prompts))
        text = "".join(map(chr, context.ids))
        asked = ["".join(map(chr, p)) for p in prompts]
        return [[ord(c) for c in solve(text, p)] if context.damage <= 1 else [63] for p in asked]


@pytest.fixture
def judged(tmp_path):
    replay, journal = Reader(), Journal(tmp_path / "journal.jsonl", "ruler")
    kinds = ("niah_multikey_1", "vt", "qa_2", "cwe")
    given = {"journal": journal, "samples": 2, "kinds": kinds, "progress": quiet}
    left_out = ruler.judge_ruler(replay, [MILD, HARD], HAY, [1024, LENGTH], **given)
    return SimpleNamespace(**locals())


def test_methods_are_scored_beside_the_exact_cache(judged):
    summary = ruler_summary(judged.journal.used())
    assert summary["exact"][str(LENGTH)] == {
        "mean": 1.0,
        "kinds": dict.fromkeys(("niah_multikey_1", "vt", "qa_2", "cwe"), 1.0),
        "asked": {"niah_multikey_1": 8, "vt": 2, "qa_2": 8, "cwe": 2},
    }
    assert summary["methods"]["mild"]["lengths"][str(LENGTH)]["mean"] == 1.0
    assert summary["methods"]["hard"]["lengths"][str(LENGTH)]["mean"] == 0.0
    assert [text.split(":")[0] for text in judged.left_out] == [
        f"{kind} has no task of 1024 tokens; its shortest is longer" for kind in ("vt", "cwe")
    ]


def test_questions_of_one_context_are_one_batch(judged):
    """Six contexts of four questions and four of one, each under exact and two methods."""
    assert sorted(judged.replay.batches) == [1] * 12 + [4] * 24


def test_a_second_run_computes_nothing(judged):
    before = judged.replay.prefills
    ruler.judge_ruler(judged.replay, [MILD, HARD], HAY, [1024, LENGTH], **judged.given)
    assert judged.replay.prefills == before


def test_the_report_has_a_table_for_each_length(judged):
    found = ruler_sections({"ruler": ruler_summary(judged.journal.used())})
    assert [s.title for s in found][-1] == f"RULER at {LENGTH} tokens"
    rows = {row[0]: row for row in found[-1].rows}
    assert rows["hard"][2:] == ["0.0"] * 5 and rows["exact cache"][2:] == ["100.0"] * 5
    assert list(found[-1].columns[2:]) == ["mean", "niah_multikey_1", "vt", "qa_2", "cwe"]
    assert ruler_sections({}) == []
