"""The judge counts every result once, over a replay that copies from its context."""

from __future__ import annotations

import json
import math

import pytest
import torch

from spectral_paged.benchmarks.quality import judge, layers, summary
from spectral_paged.benchmarks.quality.divergence import divergence, target_nll
from spectral_paged.benchmarks.quality.journal import BASELINE, Journal, merged, read_records
from support.copying_replay import HARD, MILD, CopyingReplay, Noise, haystack, quiet, windows


@pytest.fixture
def replay():
    return CopyingReplay()


def test_divergence_is_that_of_the_definition_and_zero_for_equals():
    a, b = torch.randn(70, 11), torch.randn(70, 11)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    want = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(a, b), want)
    assert float(divergence(a, a).abs().max()) == 0.0
    targets = torch.randint(11, (70,))
    want = torch.nn.functional.cross_entropy(a.double(), targets, reduction="none")
    torch.testing.assert_close(target_nll(a, targets), want)


def test_more_noise_is_more_divergence_and_every_token_counts(replay):
    found = judge.judge_continuation(
        replay, [MILD, HARD], windows(), journal=Journal(None, "m"), progress=quiet
    )
    mild, hard = found["methods"]["mild"], found["methods"]["hard"]
    assert found["exact"]["tokens"] == mild["tokens"] == 4 * 16
    assert 0 < mild["kl"] < hard["kl"] and mild["kl"] <= mild["kl_p99"]
    assert mild["top1"] > hard["top1"]
    assert set(mild["kl_by_genre"]) == {"fiction", "code"}
    assert mild["ratio"] == 2.0
    assert replay.prefills == 4


def test_a_rerun_skips_finished_units_and_computes_only_new_methods(replay, tmp_path):
    path = tmp_path / "journal.jsonl"
    first = judge.judge_continuation(
        replay, [MILD], windows(), journal=Journal(path, "m"), progress=quiet
    )
    again = judge.judge_continuation(
        replay, [MILD], windows(), journal=Journal(path, "m"), progress=quiet
    )
    assert replay.prefills == 4 and again == first
    judge.judge_continuation(
        replay, [MILD, HARD], windows(), journal=Journal(path, "m"), progress=quiet
    )
    assert replay.prefills == 8
    assert len(read_records(path)) == len(merged([path])) == 4 * 3
    assert len(Journal(path, "another model")) == 0
    journal = Journal(path, "m")
    assert judge.judge_continuation(replay, [HARD], windows()[:2], journal=journal, progress=quiet)[
        "methods"
    ].keys() == {"hard"}
    assert len(journal) == 12 and len(journal.used()) == 4


def test_a_report_alone_takes_whole_units_and_the_last_version_of_a_method():
    journal = Journal(None, "m")
    head = {"task": "continuation", "length": 1024, "segment": None}
    for unit, keys in {"whole": ["a/1", "b/1", "a/2"], "cut off": ["a/1"]}.items():
        for key in [BASELINE, *keys]:
            journal.write(unit, key, {**head, "method": key.partition("/")[0], "result": key})
    journal.write("other kind", "a/1", {**head, "length": 2048, "method": "a", "result": "a/1"})
    assert journal.use_all() == 1
    used = [(r["unit"], r["result"]) for r in journal.used()]
    assert sorted(used) == [
        ("other kind", "a/1"),
        ("whole", "a/2"),
        ("whole", "b/1"),
        ("whole", BASELINE),
    ]


def test_methods_of_one_name_and_other_fields_do_not_share_results():
    assert judge.method_key(Noise("a", 0.1)) != judge.method_key(Noise("a", 0.2))
    assert judge.method_key(Noise("a", 0.1)) == judge.method_key(Noise("a", 0.1))


def test_a_journal_cut_off_in_a_line_goes_on_before_it(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, "m").write("unit", "a", {"method": "a", "result": [math.nan, 1.0]})
    with open(path, "a") as file:
        file.write('{"key": "cut of')
    assert [r["result"] for r in read_records(path)] == [[None, 1.0]]
    Journal(path, "m").write("unit", "b", {"method": "b", "result": []})
    assert Journal(path, "m").find("unit", "b") is not None


def test_logits_that_are_not_finite_are_said_and_not_averaged(replay):
    bad = Noise("bad", math.nan)
    found = judge.judge_continuation(
        replay, [bad], windows(), journal=Journal(None, "m"), progress=quiet
    )
    assert found["methods"]["bad"]["kl"] is None
    assert found["methods"]["bad"]["tokens_not_finite"] == 64
    json.dumps(found, allow_nan=False)


def test_needles_are_collected_until_enough_are_recalled(replay):
    found = judge.judge_needles(
        replay,
        [MILD, HARD],
        haystack(),
        [1024],
        journal=Journal(None, "m"),
        target=20,
        progress=quiet,
    )
    assert found["reached"] and found["exact"]["total"] == [27, 27]
    assert found["methods"]["mild"]["total"] == [27, 27]
    assert found["methods"]["hard"]["total"] == [0, 27]
    assert found["methods"]["mild"]["tail"] == [0, 0]
    assert found["exact"]["by_length"]["needle-8"] == {"1024": [24, 24]}


def test_only_what_the_exact_cache_recalls_is_asked(replay):
    replay.generate = lambda context, prompts, max_tokens, eos=None: [[63]] * len(prompts)
    found = judge.judge_needles(
        replay,
        [MILD],
        haystack(),
        [1024],
        journal=Journal(None, "m"),
        max_rounds=1,
        progress=quiet,
    )
    assert not found["reached"]
    assert found["exact"]["total"] == [0, 9]
    assert found["methods"]["mild"]["total"] == [0, 0]


def test_facts_outside_of_a_methods_pages_are_counted_apart(replay):
    wide = Noise("wide", 0.1, num_landmark_tokens=640)
    found = judge.judge_needles(
        replay,
        [wide],
        haystack(),
        [2048],
        journal=Journal(None, "m"),
        max_rounds=1,
        progress=quiet,
    )
    m = found["methods"]["wide"]
    assert m["tail"][1] > 0 and m["total"][1] > 0
    assert m["tail"][1] + m["total"][1] <= 9


def test_tasks_of_every_kind_are_asked(replay):
    found = judge.judge_tasks(
        replay,
        [MILD],
        haystack(),
        [2048],
        journal=Journal(None, "m"),
        max_rounds=1,
        progress=quiet,
    )
    kinds = found["exact"]["by_kind"]["task"]
    assert set(kinds) == {"qa-beginning", "qa-middle", "qa-end", "signature", "step", "summary"}
    assert all(right == asked for right, asked in kinds.values())


def test_an_answer_must_end_where_it_should():
    assert judge.is_answer(" 1234567.\n", "1234567")
    assert not judge.is_answer(" 12345678", "1234567")
    assert not judge.is_answer("the 1234567", "1234567")


def test_generation_seals_blocks_when_they_fall_due(replay):
    sealed = []
    replay.seal = lambda context, method: sealed.append(len(context.ids)) or context
    ids = judge.generate_sealing(replay, [65] * 500, MILD, 200)
    assert len(ids) == 200
    assert sealed == [499, 640]


def test_generation_summary_knows_repetition():
    told = {"family": "int", "landmarks": 64, "bytes_per_token": 1.0, "ratio": 2.0}
    head = {"task": "generation", "unit": "u", "length": 500}
    records = [
        {**head, "key": "a", "method": BASELINE, "result": list(range(20))},
        {**head, **told, "key": "b", "method": "stuck", "result": [0, 1, 2] + [3] * 17},
    ]
    found = summary.generation_summary(records)
    stuck = found["methods"]["stuck"]["lengths"]["500"]
    assert stuck["prefix"] == 4
    assert stuck["repetition"] > 0.7 > stuck["distinct2"]
    assert found["exact"]["500"]["repetition"] == 0.0


def test_one_layer_leaves_the_others_exact():
    x = torch.randn(1, 1, 512, 8)
    cos, sin = torch.ones(1, 1, 512, 4), torch.zeros(1, 1, 512, 4)

    class Zero(Noise):
        def rebuild(self, layer, k, v, cos, sin):
            return torch.zeros_like(k), torch.zeros_like(v)

    alone = layers.OneLayer(Zero("zero", 0.0), 1)
    assert alone.rebuild(1, x, x, cos, sin)[0].abs().sum() == 0
    torch.testing.assert_close(alone.rebuild(0, x, x, cos, sin)[0], x)


def test_sensitivity_has_a_number_a_layer(replay):
    found = layers.judge_sensitivity(
        replay, [MILD], windows(2), journal=Journal(None, "m"), progress=quiet
    )
    assert len(found["mild"]["layers"]) == 2
