"""`bench quality` runs the chosen sections, resumes from its journal and writes its report."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace

import pytest

from spectral_paged.benchmarks.quality import page_methods, ruler, run, sources
from spectral_paged.benchmarks.quality.experiments import EXPERIMENTS, judge_experiments, refitted
from spectral_paged.benchmarks.quality.formats import MethodSet, parsed_variant, rank_grid
from spectral_paged.benchmarks.quality.journal import Journal
from spectral_paged.benchmarks.quality.judge import num_sealed
from spectral_paged.benchmarks.quality.replay import Replay
from spectral_paged.benchmarks.quality.tasks import continuation_windows
from spectral_paged.errors import FormatError, InvalidRequestError
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import PRESETS
from support.copying_replay import Characters, haystack
from support.tiny_model import VOCAB, tiny_format, tiny_model


class Folded(Characters):
    """Characters folded into the tiny model's vocabulary."""

    def __call__(self, text, add_special_tokens=True):
        ids = super().__call__(text, add_special_tokens)["input_ids"]
        return {"input_ids": [i % VOCAB for i in ids]}


@functools.cache
def loaded(tokenizer=True):
    model = tiny_model()
    tokens = Folded() if tokenizer else None
    return LoadedModel("tiny", model, tokens, ModelGeometry.from_config(model.config))


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load_model", lambda name, device, dtype: loaded())
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"Chapter {i} tells of the {i}th day at sea." for i in range(200)))
    return f"fiction={file}"


def options(tmp_path, text, **changes):
    small = {
        "model": "a/Tiny-0.1B",
        "formats": ["spectral-int8"],
        "lengths": [1024],
        "windows": 1,
        "continuation_tokens": 24,
        "needles": 1,
        "texts": [text],
        "output_dir": tmp_path / "out",
        "journal": tmp_path / "journal.jsonl",
        "quick": True,
    }
    return run.Options(**(small | changes))


def written(tmp_path):
    out = tmp_path / "out"
    results = json.loads((out / "quality-Tiny-0.1B.json").read_text())
    return results, (out / "quality-Tiny-0.1B.md").read_text()


def titles(report):
    return re.findall(r"^## (.*)", report, re.MULTILINE)


def test_every_section_is_run_and_written(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(run, "SEGMENTS", (512,))
    # a random model never ends an answer: each would be of 128 tokens, by 22 methods
    brief = {name: replace(kind, max_tokens=4) for name, kind in ruler.KINDS.items()}
    monkeypatch.setattr(ruler, "KINDS", brief)
    everything = [*run.SECTIONS, *EXPERIMENTS]
    assert run.main(options(tmp_path, text, sections=everything, lengths=[1024, 1536])) == 0
    results, report = written(tmp_path)
    assert {
        "Divergence from the exact cache",
        "Needles",
        "Tasks with exact answers",
        "RULER at 1024 tokens",
        "Ranks",
        "Longer contexts",
        "Prefill over pages",
        "Landmarks",
        "Hot window",
        "Where the basis comes from",
        "Tokens weighed by attention",
        "Attention-weighted against plain decomposition",
        "Reconstruction error",
        "Attention output by layer and head",
        "Singular values of K and V",
        "Sensitivity of layers",
        "Storage with landmarks and tail",
        "Free generation",
    } <= set(titles(report))
    assert any(t.startswith("Ablation of") for t in titles(report))
    assert set(results["methods"]) == set(results["overall"]["methods"])
    assert {"spectral-int8", "kivi3", "fp8-calibrated"} <= set(results["methods"])
    assert results["environment"]["torch"] and results["texts"][0]["name"] == "text.txt"
    heads = results["reconstruction"]["kivi3"]["attention"]
    assert len(heads) == 2 and len(heads[0]) == 4 and all(x > 0 for row in heads for x in row)
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) >= 7 and all(p.stat().st_size > 4000 for p in pictures)
    assert re.search(r"\[ +\d+\.\d s\] window 1/1: fiction 1024", capsys.readouterr().out)
    assert run.plot([tmp_path / "out" / "quality-Tiny-0.1B.json"] * 2, tmp_path) == 0
    assert (tmp_path / "quality-pareto.png").stat().st_size > 10_000


def test_a_variant_of_a_preset_is_judged_under_the_text_that_describes_it(tmp_path, text):
    given = "spectral-page k=16x8 v=16x4 outlier_slots=2 gain=false rope=pre"
    asked = options(tmp_path, text, variants=[given], peers=False, sections=["continuation"])
    assert run.main(asked) == 0
    results, _ = written(tmp_path)
    format = results["formats"][given]
    assert (format["k_bands"], format["v_bands"]) == ([[16, 8]], [[16, 4]])
    assert (format["outlier_slots"], format["gain"], format["rope"]) == (2, False, "pre")
    assert format["basis"] == "page" and format["mean"] is True
    assert set(results["methods"]) == {"spectral-int8", given}


@pytest.mark.parametrize("part", ["k=16", "k=16x8,48x2", "colour=red", "gain"])
def test_a_variant_that_is_written_otherwise_is_refused_with_the_fields(part):
    with pytest.raises(InvalidRequestError, match="k=16x8.48x2.*fields are name, num_kv_heads"):
        parsed_variant(f"spectral-page {part}")


def test_causes_are_judged_at_every_length_on_code_needles_of_their_own(
    tmp_path, text, monkeypatch
):
    monkeypatch.setattr("spectral_paged.benchmarks.quality.judge.is_answer", lambda *_: True)
    asked = options(
        tmp_path,
        text,
        sections=["sides", "scales"],
        formats=["spectral-quality"],
        lengths=[1024, 1536],
        peers=False,
    )
    assert run.main(asked) == 0
    results, report = written(tmp_path)
    assert len(results["comparisons"]) == 4 and "needles" not in results
    sides, scales = results["comparisons"][:2]
    assert sides["methods"][1:] == [f"spectral-quality, {s} alone" for s in "KV"]
    assert scales["methods"][1:4] == [
        f"spectral-quality, unbiased {what}" for what in ("K", "V", "K and V")
    ]
    for group in results["comparisons"]:
        assert set(group["summary"]) == set(group["recall"]) == set(group["methods"])
        assert {asked for _, asked in group["recall"].values()} == {9}
    assert report.count("code needles") == 4


def test_causes_of_formats_without_a_calibration_are_refused(tmp_path, text):
    with pytest.raises(FormatError, match="spectral-quality or spectral-compact"):
        run.main(options(tmp_path, text, sections=["sides"]))


def test_a_second_run_finds_everything_and_says_the_same(tmp_path, text, monkeypatch):
    asked = options(tmp_path, text, sections=["continuation", "reconstruction"], peers=False)
    run.main(asked)
    first, _ = written(tmp_path)
    lines = (tmp_path / "journal.jsonl").read_text()
    monkeypatch.setattr(Replay, "prefill", None)  # nothing is left to compute
    run.main(asked)
    assert written(tmp_path)[0] == first
    assert (tmp_path / "journal.jsonl").read_text() == lines


def test_results_of_other_code_are_not_used(tmp_path, text, monkeypatch):
    asked = options(tmp_path, text, sections=["continuation"], peers=False)
    run.main(asked)
    before = len((tmp_path / "journal.jsonl").read_text().splitlines())
    monkeypatch.setattr(run, "harness_digest", lambda: "other")
    run.main(asked)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2 * before


def test_the_time_limit_ends_a_run_with_a_report_that_says_so(tmp_path, text):
    run.main(options(tmp_path, text, windows=3, peers=False, time_limit=1e-6))
    results, report = written(tmp_path)
    assert results["overall"]["exact"]["windows"] == 1
    assert "continuation, needles, reconstruction did not finish" in report


def test_an_interrupted_run_writes_what_it_has(tmp_path, text, monkeypatch):
    monkeypatch.setitem(run.SECTIONS, "needles", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    asked = options(tmp_path, text, sections=["continuation", "needles"], peers=False)
    assert run.main(asked) == 130
    results, report = written(tmp_path)
    assert "interrupted" in report and results["overall"]["methods"]


def test_what_cannot_be_run_is_refused(tmp_path, text, monkeypatch):
    with pytest.raises(InvalidRequestError, match="--sections nonsense: use continuation"):
        run.main(options(tmp_path, text, sections=["nonsense"]))
    monkeypatch.setattr(run, "load_model", lambda *_, **__: loaded(tokenizer=False))
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        run.main(options(tmp_path, text))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InvalidRequestError, match="no results"):
        run.plot([tmp_path / "other.json"], tmp_path)


# ---- formats and experiments -------------------------------------------------------------


def test_all_presets_and_peers_are_judged_unless_named():
    names = [m.name for m in MethodSet(loaded()).ours]
    assert names == [p for p in PRESETS if p != "exact"]
    chosen = MethodSet(loaded(), ["exact", "spectral-int8", "exact"], peers=False)
    assert [m.name for m in chosen.main] == ["exact", "spectral-int8"]
    assert chosen.main[0].bytes_per_token(16) == 64.0


def test_a_variant_that_changes_nothing_is_left_out():
    methods, format = MethodSet(loaded(), ["spectral-int8"]), tiny_format()
    assert methods.variant(format, "same", mean=format.mean) is None
    assert methods.variant(format, "other", mean=not format.mean).name == "other"
    assert methods.formats["other"]["mean"] is not format.mean


def test_formats_with_weights_are_bound_to_one_calibration():
    methods, format = MethodSet(loaded(), ["spectral-int8"]), tiny_format()
    assert methods.basis is None
    a = methods.variant(format, "a", dim_weighting="calibrated")
    b = methods.variant(format, "b", basis="shared")
    assert a.format.basis_id == b.format.basis_id == methods.basis.id
    assert a.fingerprint != b.fingerprint


def test_a_calibration_that_is_no_file_and_not_auto_is_refused():
    with pytest.raises(InvalidRequestError, match="calibration='online' gives no basis"):
        MethodSet(loaded(), ["spectral-quality"], calibration="online")


def test_ranks_are_in_proportion_to_the_head():
    assert rank_grid(128) == [(16, 32), (32, 64), (64, 128)]
    assert rank_grid(64) == [(16, 16), (16, 32), (32, 64)]
    assert rank_grid(16) == [(16, 16)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_compares_formats_of_different_names(name):
    experiment = EXPERIMENTS[name](MethodSet(loaded(), ["spectral-int8"]))
    names = [m.name for m in experiment.methods]
    assert len(set(names)) == len(names) >= 2
    assert experiment.described(2048)["methods"] == names


@pytest.mark.parametrize("landmarks, hot", [(0, 64), (128, 64), (64, 0), (64, 128), (64, 64)])
def test_refitted_windows_judge_the_same_tokens_behind_as_many_blocks(landmarks, hot):
    hay = haystack()
    for window in continuation_windows(hay, 1536, 6, 16):
        other = refitted(hay, window, landmarks, hot)
        assert other.continuation == window.continuation
        tail = [ord(c) for c in hay.tokenizer.decode(window.context)[-1000:]]
        assert list(other.context[-1000:]) == tail
        assert num_sealed(len(other.context), landmarks, hot) == 3
        assert len(other.context) == landmarks + 3 * 512 + hot


def test_an_experiment_shares_the_windows_of_the_main_table():
    hay = haystack(genres=("fiction",))
    hay = replace(hay, tokenizer=Folded(), _ids={})
    journal, replay = Journal(None, "m"), Replay(loaded())
    experiment = EXPERIMENTS["hot"](MethodSet(loaded(), ["spectral-int8"]))
    windows = continuation_windows(hay, 1024, 1, 16)
    judge_experiments(replay, [experiment], windows, hay, journal=journal, progress=lambda _: None)
    tasks = {r["method"]: r["task"] for r in journal.used() if r["method"] != "baseline"}
    assert sorted(tasks.values()) == ["continuation", "refitted", "refitted"]
    assert {r["result"]["sealed_blocks"] for r in journal.used() if r["method"] in tasks} == {2}


# ---- what the code is --------------------------------------------------------------------


def test_comments_do_not_make_other_code():
    plain = sources.code_of("def f(x):\n    return x + 1\n")
    told = sources.code_of('"""M."""\ndef f(x):\n    """Add."""\n    return x + 1  # one\n')
    assert plain == told != sources.code_of("def f(x):\n    return x + 2\n")
    digests = {sources.harness_digest(), sources.codec_digest()}
    assert len(digests) == 2 and all(re.fullmatch("[0-9a-f]{16}", d) for d in digests)


def test_other_codec_code_makes_our_formats_anew_and_nothing_else(tmp_path, text, monkeypatch):
    asked = options(tmp_path, text, sections=["continuation"])
    run.main(asked)
    before = len((tmp_path / "journal.jsonl").read_text().splitlines())
    monkeypatch.setattr(page_methods, "codec_digest", lambda: "other")
    run.main(asked)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == before + 1
