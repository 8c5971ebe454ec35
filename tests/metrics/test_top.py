"""The live view shows the figures of metrics, and reports when it cannot be live."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import urllib.error

import pytest
from rich.console import Console

import spectral_paged.llm
import spectral_paged.metrics
from spectral_paged.cli.commands import main
from spectral_paged.engine import Distribution, Snapshot, take_snapshot
from spectral_paged.errors import CorruptFileError, InvalidRequestError
from spectral_paged.metrics import serving, top
from spectral_paged.metrics.prometheus import parse
from spectral_paged.options import port_number
from support.tiny_model import tiny_llm

VALUES = {
    "num_requests_running": 3,
    "num_requests_waiting": 4,
    "kv_cache_usage_perc": 0.5,
    "prefix_cache_queries": 200,
    "prefix_cache_hits": 50,
    "num_preemptions": 6,
    "prompt_tokens": 1000,
    "generation_tokens": 2000,
    "recomputed_tokens": 70,
    "pages_sealed": 80,
    "pages_attended": 9000,
    "seal_time_seconds": 1.5,
    "compression_ratio": 3.25,
}


def snapshot(time=0.0, engine="0", **changes):
    values = {(name, ""): float(x) for name, x in (VALUES | changes).items()}
    values |= {("request_success", "stop"): 11.0, ("request_refused", "EmptyPromptError"): 2.0}
    held = Distribution((0.1, 0.2), (50, 49, 1), 0.0)
    return Snapshot(
        "a-model",
        engine,
        time,
        values,
        dict.fromkeys(("time_to_first_token_seconds", "inter_token_latency_seconds"), held),
    )


def drawn(view, *args):
    console = Console(file=io.StringIO(), width=100)
    console.print(view.draw(*args))
    return console.file.getvalue()


@pytest.fixture
def batch(monkeypatch, tmp_path):
    """`generate` over a small LLM: its arguments, and the LLM."""
    llm = tiny_llm()
    monkeypatch.setattr(spectral_paged.llm, "LLM", lambda *a, **k: llm)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": [i, 2, 3]}) + "\n" for i in range(1, 4)))
    argv = ["generate", "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    return [*argv, "--max-tokens", "5", "--temperature", "0"], llm


def test_every_figure_is_shown():
    text = drawn(top.View(), [snapshot()], (5, 10))
    for words in (
        "a-model [0]",
        "3 running, 4 waiting, 11 stop, 2 refused",
        "2,000 and 1,000 in all",
        "50.0% in use, 3.25x compression, 25.0% of prompt tokens found",
        "80 sealed in 1.5 s, 9,000 attended",
        "6 preemptions, 70 tokens recomputed",
        "p50 100 ms, p90 182 ms, p99 200 ms",
        "5/10 lines",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    "ratio, reason", [(0.0, True), (0.52, True), (0.994, True), (0.996, False)]
)
def test_a_ratio_below_1_has_its_reason_beside_it(ratio, reason):
    text = " ".join(drawn(top.View(), [snapshot(compression_ratio=ratio)]).split())
    assert f"{ratio:.2f}x" in text and ("exact pages free" in text.replace("│ │ ", "")) == reason


def test_so_has_the_one_that_a_batch_ends_with(batch, capsys):
    argv, _ = batch
    assert main(argv) == 0
    assert re.search(r"ratio 0\.\d\dx \(.*exact pages free\)", capsys.readouterr().out)


def test_rates_are_of_the_last_seconds_and_of_one_engine():
    view = top.View()
    assert "-/s generated" in drawn(view, [snapshot()]), "one snapshot makes no rate"
    assert "50.0/s generated" in drawn(view, [snapshot(2.0, generation_tokens=2100)])
    drawn(view, [snapshot(20.0, generation_tokens=2100)])
    assert " 0.0/s generated" in drawn(view, [snapshot(22.0, generation_tokens=2100)])
    assert "-/s generated" in drawn(view, [snapshot(22.0, "1", generation_tokens=9)])


def test_what_has_no_number_is_said():
    slow = snapshot()
    slow.durations["time_to_first_token_seconds"] = Distribution((0.1, 80.0), (0, 0, 9), 0.0)
    slow.durations["inter_token_latency_seconds"] = Distribution((0.1,), (0, 0), 0.0)
    text = drawn(top.View(), [slow])
    assert "p50 over 80 s" in text and "none yet" in text


def test_a_batch_shows_itself_live_and_the_last_frame_is_the_end(batch, monkeypatch, capsys):
    argv, llm = batch
    monkeypatch.setattr(top, "Console", lambda: Console(force_terminal=True, width=100))
    assert main([*argv, "--top"]) == 0
    out = capsys.readouterr()
    last = out.out.rsplit("LlamaForCausalLM", 1)[1]
    assert "3/3 lines" in last and "0 running, 0 waiting, 3 length" in last
    assert "15 and 9 in all" in last and "generate:" not in out.err, "no second bar"
    assert "3 lines done" in last, "the summary comes behind it"


def test_without_a_terminal_the_plain_bar_is_shown_and_it_says_so(batch, capsys):
    argv, _ = batch
    assert main([*argv, "--top"]) == 0
    out = capsys.readouterr()
    assert "stdout is no terminal, so the plain bar is shown" in out.err
    assert "3/3" in out.err and "running" not in out.out


def test_quiet_and_top_exclude_each_other(batch, capsys):
    with pytest.raises(SystemExit):
        main([*batch[0], "--top", "--quiet"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_port_serves_metrics_while_a_batch_runs(batch, monkeypatch, capsys):
    argv, llm = batch
    seen = []
    step = llm.engine.step

    def step_and_scrape():
        outputs = step()
        err = capsys.readouterr().err
        seen.append(err.split("metrics at ")[1].split()[0] if "metrics at" in err else seen[-1])
        running.append(parse(top.fetch(seen[-1]))[0].value("num_requests_running"))
        return outputs

    running = []
    monkeypatch.setattr(llm.engine, "step", step_and_scrape)
    assert main([*argv, "--metrics-port", "0"]) == 0
    assert seen[0].startswith("http://127.0.0.1:") and running[0] == 3 and running[-1] == 0
    with pytest.raises(InvalidRequestError, match="gives no metrics"):
        top.fetch(seen[0])


def test_a_taken_port_is_refused_before_the_model_is_loaded(batch, monkeypatch, capsys):
    argv, _ = batch
    monkeypatch.setattr(spectral_paged.llm, "LLM", lambda *a, **k: pytest.fail("loaded"))
    with serving(0) as (_, port):
        assert main([*argv, "--metrics-port", str(port)]) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, module, extra",
    [("--metrics-port=0", "prometheus_client", "metrics"), ("--top", "rich.live", "top")],
)
def test_a_missing_package_is_named_before_the_model_is_loaded(
    batch, monkeypatch, capsys, flag, module, extra
):
    monkeypatch.setattr(spectral_paged.llm, "LLM", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, module, None)
    loaded = {"metrics": "prometheus", "top": "top"}[extra]
    monkeypatch.delitem(sys.modules, f"spectral_paged.metrics.{loaded}")
    monkeypatch.delattr(spectral_paged.metrics, loaded)
    assert main([*batch[0], flag]) == 2
    assert f"pip install '.[{extra}]'" in capsys.readouterr().err


def test_another_process_sees_what_this_one_counts(capsys):
    llm = tiny_llm()
    with serving(0) as (collector, port):
        collector.add(llm)
        [found] = parse(top.fetch(f"http://127.0.0.1:{port}"))
        assert found.values == take_snapshot(llm).values
        assert main(["top", f"http://127.0.0.1:{port}"]) == 0
    out = capsys.readouterr()
    assert "LlamaForCausalLM [0]" in out.out and "one reading, and no updates" in out.err


def test_the_view_ends_with_the_run(monkeypatch, capsys):
    llm, answers = tiny_llm(), []
    with serving(0) as (collector, port):
        collector.add(llm)
        text = top.fetch(f"http://127.0.0.1:{port}")

    def answer(url, key):
        answers.append(url)
        if len(answers) > 3:
            raise InvalidRequestError("gone")
        return text

    monkeypatch.setattr(top, "fetch", answer)
    monkeypatch.setattr(top, "Console", lambda: Console(force_terminal=True, width=100))
    monkeypatch.setattr("spectral_paged.metrics.top.time.sleep", lambda seconds: None)
    assert main(["top", "http://localhost:1"]) == 0
    assert len(answers) == 4 and "the run has ended: gone" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["localhost:9100", "file:///etc/hostname", "http://", ""])
def test_only_http_is_fetched(url):
    with pytest.raises(InvalidRequestError, match="no URL such as"):
        top.fetch(url)


def test_an_endless_answer_is_cut_off(monkeypatch):
    class Endless(io.BytesIO):
        def read(self, size=-1):
            assert 0 < size <= top.MAX_METRICS_BYTES + 1
            return b"x" * size

    monkeypatch.setattr(top.urllib.request, "urlopen", lambda *a, **k: Endless())
    with pytest.raises(InvalidRequestError, match="more than 16 MiB"):
        top.fetch("http://localhost")


def test_nobody_answers_is_said_with_a_remedy(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("refused")

    monkeypatch.setattr(top.urllib.request, "urlopen", refuse)
    assert main(["top", "http://localhost:9100"]) == 2
    assert "http://localhost:9100/metrics gives no metrics" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("up 1\n", "another program"),
        ("<html>", "no metrics text|another program"),
        ("spectral_paged:prompt_tokens_total 3\n", "no metrics text"),
    ],
)
def test_what_is_not_ours_is_refused(text, message):
    with pytest.raises(CorruptFileError, match=message):
        parse(text)


@pytest.mark.parametrize("text", ["-1", "65536", "http", "", "1.5"])
def test_a_port_is_a_port(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no port"):
        port_number(text)
    assert port_number("65535") == 65535
