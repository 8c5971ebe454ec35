"""A program can read the log of a request: records have fields, not prose."""

from __future__ import annotations

import json
import logging

import pytest

import spectral_paged.llm
from spectral_paged import SamplingParams
from spectral_paged.cli.commands import main
from spectral_paged.cli.logs import JsonFormatter, TextFormatter, logging_to_stderr
from spectral_paged.engine import sampled_step
from spectral_paged.errors import SpectralPagedError
from spectral_paged.scheduler import PreemptionReason
from support.tiny_model import random_prompts, tiny_llm

PACKAGE = logging.getLogger("spectral_paged")
REASONS = {reason.value for reason in PreemptionReason}


def record(message="hello %s", *args, **extra):
    return PACKAGE.makeRecord(
        "spectral_paged.test",
        logging.WARNING,
        "file",
        1,
        message,
        args or ("you",),
        None,
        extra=extra,
    )


def events(err):
    return [json.loads(line) for line in err.splitlines() if line.startswith("{")]


@pytest.fixture
def tight(monkeypatch):
    """The command line gets a small LLM that preempts; no tokenizer."""
    llm = tiny_llm(kv_cache_bytes=700_000, max_num_seqs=8)
    monkeypatch.setattr(spectral_paged.llm, "LLM", lambda *a, **k: llm)
    return llm


def test_a_json_line_has_the_fields_and_cannot_be_renamed_by_them():
    found = json.loads(JsonFormatter().format(record(request_id="r1", num_tokens=7, level="x")))
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "warning",
        "logger": "spectral_paged.test",
        "message": "hello you",
        "request_id": "r1",
        "num_tokens": 7,
    }


def test_a_json_line_is_one_line_whatever_is_in_it():
    line = JsonFormatter().format(record("a\nb %s", "\ud800\n", path=ValueError("odd\nobject")))
    assert "\n" not in line and line.isascii()
    assert json.loads(line)["path"] == "odd\nobject"


def test_text_ends_in_words_that_can_be_split_again():
    line = TextFormatter().format(record(request_id="r 1", reason="pool=full", count=3, none=""))
    assert line.endswith(
        'WARNING spectral_paged.test: hello you request_id="r 1" reason="pool=full" count=3 none=""'
    )


@pytest.mark.parametrize("kind", [TextFormatter, JsonFormatter])
def test_an_exception_is_shown(kind):
    try:
        raise ValueError("inner")
    except ValueError as error:
        failed = PACKAGE.makeRecord(
            "n", logging.ERROR, "f", 1, "m", (), (type(error), error, error.__traceback__)
        )
    assert "ValueError: inner" in kind().format(failed)


def test_the_package_alone_is_shown_and_nothing_stays_behind(capsys):
    before = (PACKAGE.level, list(PACKAGE.handlers), list(logging.getLogger().handlers))
    with logging_to_stderr("text", "info"):
        logging.getLogger("spectral_paged.scheduler").info("ours")
        logging.getLogger("spectral_paged.scheduler").debug("too fine")
        logging.getLogger("another").info("theirs")
    logging.getLogger("spectral_paged").info("after")
    err = capsys.readouterr().err
    assert "INFO spectral_paged.scheduler: ours" in err
    assert not any(word in err for word in ("too fine", "theirs", "after"))
    assert (PACKAGE.level, PACKAGE.handlers, logging.getLogger().handlers) == before


def test_preemptions_are_told_with_who_why_and_how_much(tight, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    shared, *ends = random_prompts([704, 5, 90, 70, 300, 280, 310], seed=9)
    prompts = [shared + e for e in ends[:3]] + ends
    source.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    argv = ["generate", "--input", str(source), "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*argv, "--max-tokens", "70", "--temperature", "0", "--log-format", "json"]) == 0
    found = [e for e in events(capsys.readouterr().err) if e["event"] == "preemption"]
    assert len(found) == tight.stats()["preemptions"] > 0
    for event in found:
        assert event["request_id"].startswith("line-") and event["reason"] in REASONS
        assert event["num_dropped_tokens"] > 0 and event["level"] == "warning"
        assert event["num_running"] + event["num_waiting"] >= 2


def test_refused_lines_are_told_at_level_info_only(tight, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    chat = json.dumps({"messages": [{"role": "user", "content": "no template"}]})
    lines = ['{"prompt": [1, 2]}', '{"prompt": []}', "{bad", '{"prompt": [5000]}', chat]
    source.write_text("\n".join(lines))
    argv = [
        "generate",
        "--input",
        str(source),
        "--output",
        str(tmp_path / "out"),
        "--quiet",
        "--overwrite",
        "--log-format",
        "json",
    ]
    assert main(argv) == 0 and events(capsys.readouterr().err) == []
    assert tight.stats()["refused"] == {"EmptyPromptError": 1, "InvalidRequestError": 3}
    assert main([*argv, "--log-level", "info"]) == 0
    found = events(capsys.readouterr().err)
    assert [(e["event"], e["request_id"], e["reason"]) for e in found] == [
        ("refusal", "line-2", "EmptyPromptError"),
        ("refusal", "line-3", "InvalidRequestError"),
        ("refusal", "line-4", "InvalidRequestError"),
        ("refusal", "line-5", "InvalidRequestError"),
    ]


def test_a_failed_request_is_told_once_with_what_it_had(monkeypatch, caplog):
    llm = tiny_llm()
    forward, calls = llm.engine.runner.forward, []

    def spoilt(*args):
        calls.append(1)
        return forward(*args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(llm.engine.runner, "forward", spoilt)
    with pytest.raises(SpectralPagedError):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=9, n=2), use_tqdm=False)
    [event] = [r for r in caplog.records if getattr(r, "event", "") == "failure"]
    assert (event.reason, event.num_prompt_tokens, event.num_generated_tokens) == (
        "NonFiniteError",
        3,
        4,
    )
    assert event.request_id == "request-0" and event.levelname == "WARNING"


def test_a_request_whose_rows_all_fail_is_told_once_with_the_cause_of_a_row(monkeypatch, caplog):
    llm, draw = tiny_llm(), sampled_step.SampledTokens

    def picky(logits, rows, penalties):
        if any(r.params.n == 2 and r.num_output_tokens == 2 for r in rows):
            raise IndexError(f"in a batch of {len(rows)}")
        return draw(logits, rows, penalties)

    monkeypatch.setattr(sampled_step, "SampledTokens", picky)
    params = [SamplingParams(max_tokens=9, n=n) for n in (1, 2)]
    with pytest.raises(SpectralPagedError):
        llm.generate([[1, 2, 3], [4, 5]], params, use_tqdm=False)
    [told] = [r for r in caplog.records if r.name.startswith("spectral_paged")]
    assert (told.event, told.request_id) == ("failure", "request-1")
    assert "in a batch of 1" in told.getMessage()


def test_a_request_alone_whose_rows_all_fail_fails_and_raises_out_of_no_step(monkeypatch):
    llm, draw = tiny_llm(), sampled_step.SampledTokens

    def picky(logits, rows, penalties):
        if rows[0].num_output_tokens == 2:
            raise IndexError("no")
        return draw(logits, rows, penalties)

    monkeypatch.setattr(sampled_step, "SampledTokens", picky)
    llm.engine.add_request("two", [1, 2], SamplingParams(max_tokens=9, n=2))
    done = []
    while llm.engine.has_unfinished():
        done += [output for output in llm.engine.step() if output.finished]
    assert [output.error.request_id for output in done] == ["two"]
    llm.cache.check_integrity()


@pytest.mark.model
def test_a_calibration_is_told_with_its_tokens(tmp_path, capsys):
    argv = ["calibrate", "smollm2-135m", "--output", str(tmp_path / "basis.safetensors")]
    argv += ["--max-tokens", "1100", "--device", "cpu", "--log-format", "json"]
    assert main([*argv, "--log-level", "info"]) == 0
    [event] = [e for e in events(capsys.readouterr().err) if e["event"] == "calibrated"]
    assert event["model"] == "smollm2-135m" and event["num_tokens"] == 1024
    assert event["num_spans"] == 1 and len(event["model_fingerprint"]) == 16


@pytest.mark.parametrize("extra", [["--log-format", "xml"], ["--log-level", "loud"]])
def test_an_unknown_format_or_level_is_refused(extra, capsys):
    with pytest.raises(SystemExit):
        main(["info", "smollm2-135m", *extra])
    assert "invalid choice" in capsys.readouterr().err
