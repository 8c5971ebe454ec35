"""The command line: batch files, resumption, bad lines, figures and exit codes."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time

import pytest

import spectral_paged.llm
from spectral_paged.batch.file import OutputFile, read_lines
from spectral_paged.batch.run import serve_lines
from spectral_paged.cli.commands import main, parse_bytes
from spectral_paged.errors import CorruptFileError, InvalidRequestError
from spectral_paged.llm import LLM
from spectral_paged.models.calibration import model_fingerprint
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel, embedded_gguf, load_config
from spectral_paged.pages import PRESETS, PageFormat, SharedBasis
from support.served import served_llm
from support.tiny_model import tiny_model

CHAT = {
    "custom_id": "c1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {
        "model": "any",
        "messages": [{"role": "user", "content": "Name a colour."}],
        "max_completion_tokens": 5,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    },
}
GOOD = {
    1: {"prompt": "The sea is", "id": "plain", "max_tokens": 4},
    2: "Once upon a time",
    3: CHAT,
    4: {
        "custom_id": "t1",
        "url": "/v1/completions",
        "body": {
            "prompt": "One, two,",
            "max_tokens": 3,
            "n": 2,
            "temperature": 0.0,
            "logprobs": 1,
            "response_format": {"type": "text"},
            "logit_bias": {},
            "stream": False,
            "user": "u",
        },
    },
    5: {"messages": [{"role": "user", "content": "Hello!"}], "sampling_params": {"max_tokens": 3}},
}
BAD = {
    6: (b'{"prompt": ', "not JSON"),
    7: (b"[1, 2]", "an object or a string"),
    8: (b'{"prompt": ""}', "empty"),
    9: (b'{"max_tokens": 3}', "either 'prompt' or 'messages'"),
    10: (b'{"prompt": "x", "temperature": -1}', "temperature is -1"),
    11: (b'{"prompt": "x", "temprature": 1}', "temprature"),
    12: (b'{"prompt": "x", "id": "plain"}', "taken by line 1"),
    13: (b'{"custom_id": "u", "url": "/v1/embeddings", "body": {}}', "/v1/embeddings"),
    14: (
        b'{"custom_id": "v", "url": "/v1/completions", "body": {"prompt": "x", "tools": [1]}}',
        "tools",
    ),
    15: (b'{"prompt": [1, 99999999]}', "vocabulary"),
    16: (b'{"messages": [{"role": "user"}]}', "messages.0.content must be"),
    17: (b'{"prompt": "' + b"word " * 9000 + b'"}', "max_model_len"),
    18: (b'{"prompt": "x", "sampling_params": 5}', "must be an object"),
    19: (b'{"prompt": "a\\ud800b"}', "not valid Unicode"),
    20: (b'{"prompt": "x", "id": "\\udfff"}', "not valid Unicode"),
    21: (b"[" * 100_000, "not JSON"),
    22: (
        b'{"custom_id": "w", "method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}}',
        "'POST'",
    ),
    23: (b'{"prompt": "\xff"}', "not JSON"),
}


@pytest.fixture(scope="module")
def shared_llm():
    return LLM(kv_cache_bytes=256 << 20, max_num_seqs=4)


@pytest.fixture
def one_llm(shared_llm, monkeypatch):
    """The command line gets a loaded LLM; counts how often it asked."""
    calls = []

    def factory(*args, **kw):
        calls.append(kw)
        return shared_llm

    monkeypatch.setattr(spectral_paged.llm, "LLM", factory)
    return calls


@pytest.fixture
def source(tmp_path):
    lines = [json.dumps(value).encode() for value in GOOD.values()]
    lines += [raw for raw, _ in BAD.values()]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    return path


def run(source, output, *extra):
    return main(
        [
            "generate",
            "--input",
            str(source),
            "--output",
            str(output),
            "--quiet",
            "--temperature",
            "0",
            "--max-tokens",
            "6",
            *extra,
        ]
    )


def records(path):
    return {r["line"]: r for r in map(json.loads, path.read_text().splitlines())}


@pytest.mark.model
def test_good_lines_are_answered_and_bad_ones_get_records_with_their_number(
    one_llm, source, tmp_path
):
    out = tmp_path / "out.jsonl"
    assert run(source, out) == 0
    got = records(out)
    assert sorted(got) == sorted(GOOD | BAD)
    for number, (_, message) in BAD.items():
        assert message in got[number]["error"]["message"]
        assert got[number]["error"]["line"] == number
    assert all(got[n]["error"] is None for n in GOOD)
    assert got[1]["custom_id"] == "plain" and len(got[1]["outputs"][0]["token_ids"]) == 4
    assert got[2]["outputs"][0]["text"] and got[2]["usage"]["completion_tokens"] == 6
    chat = got[3]["response"]["body"]
    assert chat["object"] == "chat.completion" and chat["usage"]["completion_tokens"] <= 5
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert len(chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) >= 2
    body = got[4]["response"]["body"]
    assert [c["index"] for c in body["choices"]] == [0, 1] and body["object"] == "text_completion"
    columns = body["choices"][0]["logprobs"]
    assert "".join(columns["tokens"]) == body["choices"][0]["text"]
    assert all(p <= 0 for p in columns["token_logprobs"]) and len(columns["top_logprobs"]) == 3
    assert chat["created"] > 0 and body["created"] > 0
    assert (got[14]["custom_id"], got[14]["response"], got[14]["error"]["code"]) == (
        "v",
        None,
        "InvalidRequestError",
    )
    assert got[12]["custom_id"] == "plain", "a refused line keeps its id"
    assert got[5]["outputs"][0]["token_ids"]


def test_ids_of_a_batchs_answers_tell_chat_and_text_apart(tmp_path):
    """As OpenAI's, and as those of the server."""
    source = tmp_path / "in.jsonl"
    text = {"custom_id": "text", "url": "/v1/completions", "body": {"prompt": "x"}}
    chat = {
        "custom_id": "chat",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "x"}]},
    }
    source.write_text("".join(json.dumps(line) + "\n" for line in (text, chat)))
    with served_llm() as llm:
        results = list(serve_lines(llm, read_lines(source, {"max_tokens": 2})))
    ids = {r.record["custom_id"]: r.record["response"]["body"]["id"] for r in results}
    assert ids == {"text": "cmpl-1", "chat": "chatcmpl-2"}


@pytest.mark.model
@pytest.mark.parametrize("kept", [0, 3, 8])
def test_a_torn_output_resumes_without_losing_or_redoing_a_line(
    one_llm, source, tmp_path, kept, shared_llm, monkeypatch
):
    whole = tmp_path / "whole.jsonl"
    run(source, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
    asked = []
    add = shared_llm.engine.add_request
    monkeypatch.setattr(
        shared_llm.engine, "add_request", lambda i, *a, **k: (asked.append(i), add(i, *a, **k))
    )
    assert run(source, torn) == 0
    assert torn.read_bytes().startswith(b"".join(lines[:kept]))
    finished = {json.loads(raw)["line"] for raw in lines[:kept]}
    assert not {f"line-{n}" for n in finished} & set(asked)
    strip = {"metrics", "response"}  # prefix hits differ, ids of requests differ

    def content(path):
        return {n: {k: v for k, v in r.items() if k not in strip} for n, r in records(path).items()}

    assert content(torn) == content(whole)
    asked.clear()
    assert run(source, torn) == 0 and not asked


@pytest.mark.model
def test_what_a_killed_process_finished_is_gone_on_from(one_llm, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [f"Number {i} is" for i in range(16)]
    source.write_text("".join(json.dumps(t) + "\n" for t in texts))
    command = [
        sys.executable,
        "-m",
        "spectral_paged.cli",
        "generate",
        "--input",
        str(source),
        "--output",
        str(out),
        "--max-num-seqs",
        "1",
        "--max-tokens",
        "4",
        "--temperature",
        "0",
        "--kv-cache-bytes",
        "64MiB",
        "--quiet",
    ]
    process = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 2 <= before.count(b"\n") < 16
    assert main(command[3:]) == 0
    after = out.read_bytes()
    assert after.startswith(before), "finished lines stay as they are"
    lines = [json.loads(raw)["line"] for raw in after.splitlines()]
    assert sorted(lines) == list(range(1, 17)), "every line once"


def test_an_output_of_another_input_is_refused(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"one"\n')
    file = OutputFile(out)
    file.write({"line": 1, "line_hash": "other", "error": None})
    file.close()
    again = OutputFile(out)
    with pytest.raises(InvalidRequestError, match="--overwrite"):
        again.has(next(read_lines(source, {})))
    again.close()
    fresh = OutputFile(out, overwrite=True)
    assert not fresh.has(next(read_lines(source, {})))


@pytest.mark.parametrize("notes", ["my notes\n", "my notes, no newline", '{"line": 1}\n'])
def test_a_foreign_output_file_is_neither_appended_to_nor_cut(tmp_path, notes):
    out = tmp_path / "notes.txt"
    out.write_text(notes)
    with pytest.raises(CorruptFileError, match="line 1"):
        OutputFile(out)
    assert out.read_text() == notes


@pytest.mark.parametrize("lines", [["one", "other"], ["one"]])
def test_a_late_mismatch_is_refused_before_anything_is_served(tmp_path, lines, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"one"\n"two"\n')
    file = OutputFile(out)
    *_, second = read_lines(source, {})
    file.write({"line": 2, "line_hash": second.digest, "error": None})
    file.close()
    file.check(source)
    before = out.read_bytes()
    source.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert run(source, out) == 2
    assert "--overwrite" in capsys.readouterr().err and out.read_bytes() == before


@pytest.mark.parametrize("extra", [["--model", "/no/such.gguf"], ["--top-p", "7"]])
def test_a_run_that_never_starts_keeps_the_earlier_output(tmp_path, extra):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"one"\n')
    out.write_text("earlier\n")
    assert run(source, out, "--overwrite", *extra) == 2
    assert out.read_text() == "earlier\n"


def test_an_input_is_never_its_own_output(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('"one"\n')
    assert run(source, source, "--overwrite") == 2
    assert "both" in capsys.readouterr().err and source.read_text() == '"one"\n'


def test_an_output_that_cannot_be_written_exits_with_its_message(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('"one"\n')
    assert run(source, tmp_path / "none" / "out.jsonl") == 2
    assert "out.jsonl" in capsys.readouterr().err


@pytest.mark.model
def test_an_interrupt_keeps_finished_lines_and_says_how_to_go_on(
    one_llm, shared_llm, tmp_path, monkeypatch, capsys
):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(f"Number {i} is") + "\n" for i in range(12)))
    step = shared_llm.engine.step

    def interrupted():
        if out.read_bytes():
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(shared_llm.engine, "step", interrupted)
        assert run(source, out) == 130
    assert "the same command goes on" in capsys.readouterr().err
    before = out.read_bytes()
    assert 1 <= before.count(b"\n") < 12 and before.endswith(b"\n")
    assert not shared_llm.engine.has_unfinished(), "nothing is left behind in the engine"
    assert run(source, out) == 0
    assert out.read_bytes().startswith(before) and sorted(records(out)) == list(range(1, 13))


@pytest.mark.model
def test_overwrite_starts_again(one_llm, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"one"\n')
    out.write_text("earlier\n")
    assert run(source, out, "--overwrite") == 0
    assert list(records(out)) == [1]


@pytest.mark.model
def test_info_prints_the_formats_own_numbers(capsys):
    assert main(["info", "smollm2-135m", "--memory", "1GiB"]) == 0
    printed = capsys.readouterr().out
    geometry = ModelGeometry.from_config(load_config("smollm2-135m"))
    for preset in PRESETS:
        row = next(x for x in printed.splitlines() if x.split() and x.split()[0] == preset)
        format = PageFormat.preset(
            preset, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim
        )
        if format.seals:
            slots = (1 << 30) // (format.page_bytes * geometry.num_layers)
            assert str(format.page_bytes) in row and f"{format.page_ratio:.2f}x" in row
            assert row.split()[-2:] == [str(slots), str(slots * 512)]


@pytest.mark.parametrize(
    "text, value",
    [("16GiB", 16 << 30), ("512MiB", 512 << 20), ("1.5G", 3 << 29), ("7", 7), ("2 kb", 2048)],
)
def test_amounts_of_memory(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "x", "12QB", "-1", "0", "1.2.3"])
def test_no_amount_of_memory(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bytes(text)


def test_an_unknown_model_exits_with_its_message(capsys):
    assert main(["info", "/no/such/model.gguf"]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_an_unsupported_model_exits_with_its_message(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["info", str(tmp_path)]) == 2
    assert "'gpt2' is not supported" in capsys.readouterr().err


def test_a_missing_input_exits_with_its_message(tmp_path, capsys):
    assert main(["generate", "--input", str(tmp_path / "no"), "--output", "x"]) == 2
    assert "there is no input file" in capsys.readouterr().err


@pytest.mark.model
@pytest.mark.parametrize("keep", [3, 20, 5000, 0.5])
def test_a_truncated_gguf_exits_with_its_message(tmp_path, capsys, keep, monkeypatch):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "cache"))
    whole = embedded_gguf("smollm2-135m")
    size = int(whole.stat().st_size * keep) if isinstance(keep, float) else keep
    cut = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        cut.write_bytes(file.read(size))
    assert main(["info", str(cut)]) == 2
    assert "cut.gguf" in capsys.readouterr().err


def test_calibrate_writes_a_file_for_this_model_alone(tmp_path, capsys, monkeypatch):
    model = tiny_model()
    loaded = LoadedModel(
        "tiny",
        model,
        lambda text: {"input_ids": [ord(c) % 199 for c in text]},
        ModelGeometry.from_config(model.config),
    )
    monkeypatch.setattr("spectral_paged.models.loader.load_model", lambda *_, **__: loaded)
    data, out = tmp_path / "data.txt", tmp_path / "new" / "basis.safetensors"
    data.write_text("some words " * 400)
    line = ["calibrate", "tiny", "--data", str(data), "--device", "cpu", "--output"]
    assert main([*line, str(out), "--max-tokens", "2500"]) == 0
    basis = SharedBasis.load(out, model_fingerprint=model_fingerprint(model))
    assert basis.num_tokens == 2048 and list(out.parent.iterdir()) == [out]
    assert f"{out}: 2048 tokens" in capsys.readouterr().out
    assert main([*line, str(tmp_path)]) == 2
    assert "is a folder: name a file" in capsys.readouterr().err
    assert main([*line, str(data / "below.safetensors")]) == 2
    assert str(data) in capsys.readouterr().err
    data.write_text("short")
    assert main([*line, str(out)]) == 2
    assert "has 5 tokens; at least 576" in capsys.readouterr().err
    data.unlink()
    assert main([*line, str(out)]) == 2
    assert f"there is no file {data}" in capsys.readouterr().err
