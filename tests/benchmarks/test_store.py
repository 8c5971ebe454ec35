"""`bench store` compares answers before it times anything, and measures what came from where."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from spectral_paged.benchmarks.store import answers, engines, run, sizes
from spectral_paged.benchmarks.store.answers import Answer, check_equal
from spectral_paged.benchmarks.store.disk_speed import measure_disk
from spectral_paged.cli.commands import main
from spectral_paged.errors import InvalidRequestError
from spectral_paged.outputs import Logprob

TINY = sizes.SUITES["tiny"]


def bench(tmp_path, part, *more):
    line = f"bench store --suite tiny --device cpu --dtype float32 --only {part}"
    where = ["--output-dir", str(tmp_path), "--kv-store", str(tmp_path)]
    assert main([*line.split(), *where, *more]) == 0
    result = json.loads((tmp_path / f"store-tiny-{part}.json").read_text())
    assert (tmp_path / f"store-tiny-{part}.png").stat().st_size
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == [], "folders of records are left"
    assert result["environment"]["commit"] and result["ties"] == 0
    assert result["disk"]["read_bytes_per_second"] > 0
    return result


def test_first_tokens_are_timed_from_every_tier(tmp_path, capsys):
    result = bench(tmp_path, "ttft")
    rows = [row for row in result["rows"] if row["kind"] == "FirstToken"]
    assert {(row["source"], row["input_len"]) for row in rows} == {
        (source, length) for source in ("cold", "gpu", "host", "disk") for length in TINY.lengths
    }
    for row in rows:
        found = {tier for tier, count in row["cached"].items() if count}
        assert found == ({row["source"]} - {"cold"})
        assert (row["load_bytes"] > 0) == (row["source"] in ("host", "disk"))
        assert all(seconds > 0 for seconds in row["seconds"])
    for row in result["rows"]:
        if row["kind"] == "Held":
            assert 0 < row["bytes"] < TINY.prompts_host_bytes and row["tokens"] > 1000
    assert "of cold" in capsys.readouterr().out


def test_conversations_are_served_with_and_without(tmp_path):
    rows = bench(tmp_path, "turns", "--conversations", "5")["rows"]
    assert [(row["store"], row["round"]) for row in rows] == [
        (store, turn) for store in ("off", "host") for turn in range(TINY.num_turns)
    ]
    assert all(row["num_requests"] == 5 for row in rows)
    hits = [row["moved"]["hit_tokens"] for row in rows]
    assert not any(found["host"] for found in hits[: TINY.num_turns + 1])
    for found in hits[TINY.num_turns + 1 :]:
        assert found["host"] and found["host"] + found["gpu"] >= 5 * 1088


def test_documents_come_back_after_a_restart(tmp_path):
    rows = bench(tmp_path, "documents")["rows"]
    assert [(row["store"], row["round"]) for row in rows] == [
        ("off", 0),
        ("off", 1),
        ("host", -1),
        ("host", 0),
        ("host", 1),
        ("restarted", 0),
        ("restarted", 1),
    ]
    below = [row["moved"]["hit_tokens"] for row in rows]
    assert all(sum(hits.values()) >= 3 * 1088 for hits in below[3:])
    assert below[3]["host"] and below[5]["disk"]
    assert not any(hits["host"] + hits["disk"] for hits in below[:2])


def test_requests_that_have_nothing_in_common_find_nothing(tmp_path):
    rows = bench(tmp_path, "nohit")["rows"]
    assert [row["store"] for row in rows] == ["host and disk", "off", "off", "host and disk"]
    assert all(not any(row["moved"]["hit_tokens"].values()) for row in rows)
    written = [row["moved"]["written_bytes"]["host"] > 0 for row in rows]
    assert written == [True, False, False, True]


def answer(tokens, logprobs=()):
    found = [{t: Logprob(p, 1, "") for t, p in table.items()} for table in logprobs]
    return Answer(0.1, tokens, found, {})


def test_answers_may_part_at_a_tie_alone():
    cold = answer([3, 4], [{3: -1.0, 9: -3.0}, {4: -1.0, 5: -1.01, 6: -2.0}])
    assert check_equal(cold, answer([3, 4]), "x")
    assert not check_equal(cold, answer([3, 5]), "x")
    for other in ([3, 6], [3, 7], [9, 4]):
        with pytest.raises(ArithmeticError, match="from host: token [01] is [967]"):
            check_equal(cold, answer(other), "from host")


def test_a_store_that_gives_nothing_or_other_answers_is_not_timed(tmp_path, monkeypatch):
    def without(llm, prompt):
        return replace(answers.ask(llm, prompt), cached=dict.fromkeys(("gpu", "host", "disk"), 0))

    monkeypatch.setattr(engines, "ask", without)
    with pytest.raises(ArithmeticError, match="did not come back; not timed"):
        bench(tmp_path, "ttft")


def test_the_disk_is_measured_and_left_empty(tmp_path):
    found = measure_disk(tmp_path, 5000)
    assert (found.num_files, found.file_bytes) == (1, 5000)
    assert found.write_bytes_per_second > 0 < found.cached_read_bytes_per_second
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how, words", [({"suite": "7b"}, "8b, tiny"), ({"only": ("x",)}, "ttft")])
def test_what_there_is_not_is_refused(tmp_path, how, words):
    with pytest.raises(InvalidRequestError, match=words):
        run.main(run.Options(**{"suite": "tiny", "output_dir": tmp_path} | how))
