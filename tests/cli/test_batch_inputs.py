"""Inputs of other kinds are refused once; an output goes on only with what it was begun with."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys

import pytest
from transformers.utils import logging as transformers_logging

import spectral_paged.llm
from spectral_paged.batch.file import OutputFile, count_lines, read_lines
from spectral_paged.cli.commands import main
from spectral_paged.errors import InvalidRequestError
from support.served import served_llm

TEXT = '{"prompt": "abc"}\n\n"z\u00fc\u2028x"\r\n"\U0001f600"\n'
PROMPTS = ["abc", "z\u00fc\u2028x", "\U0001f600"]
READ = {
    "utf-8": TEXT.encode(),
    "utf-8 with mark": TEXT.encode("utf-8-sig"),
}
OBJECTS = [{"prompt": "a"}, {"prompt": "b"}]
REFUSED = {
    "csv": (b"id,prompt\n1,hello\n", "begin.*read_csv"),
    "quoted csv": (b'"id","prompt"\n"1","hello"\n', "read_csv"),
    "csv with a quoted cell": (b'prompt\nhello\n"a, b"\n', "'prompt'.*read_csv"),
    "numbered text": (b"1\nOnce upon a time\n2\n", "no line.*is a JSON object"),
    "lists": (b"[1, 2]\n[3]\n", "no line.*is a JSON object"),
    "text": (b"Once upon a time\nthere was\n", "'Once upon a time'.*JSON object a line"),
    "array": (json.dumps(OBJECTS).encode(), "a JSON array.*jq -c"),
    "array with line end": (json.dumps(OBJECTS).encode() + b"\n", "a JSON array"),
    "array over lines": (json.dumps(OBJECTS, indent=1).encode(), "a JSON array"),
    "array of lines": (b'[{"prompt": "a"},\n{"prompt": "b"}]\n', "a JSON array"),
    "object over lines": (json.dumps(OBJECTS[0], indent=1).encode(), "over several lines.*jq -c"),
    "utf-16 without mark": (TEXT.encode("utf-16-le"), "save it as UTF-8"),
    "empty": (b"", "no line"),
    "blank": (b"\n \n", "no line"),
    "zip": (b"PK\x03\x04rest", "a zip archive.*unzip"),
    "bz2": (b"BZh91AYrest", "bzip2"),
    "parquet": (b"PAR1rest", "Parquet.*read_parquet"),
    "gz": (gzip.compress(TEXT.encode()), "gzip.*gunzip"),
    "utf-16": (TEXT.encode("utf-16"), "UTF-16.*iconv -f UTF-16"),
    "utf-16 big": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "UTF-16.*iconv"),
    "utf-32": (TEXT.encode("utf-32"), "UTF-32.*iconv -f UTF-32"),
}


@pytest.fixture(autouse=True)
def llm(monkeypatch):
    """The command line gets a small LLM; `None` as long as none may be loaded."""
    loaded = []

    def factory(*args, **options):
        loaded.append(served_llm())
        return loaded[-1]

    monkeypatch.setattr(spectral_paged.llm, "LLM", factory)
    return loaded


def run(source, output, *extra):
    fixed = ["--max-tokens", "3", "--quiet"]
    return main(["generate", "--input", str(source), "--output", str(output), *fixed, *extra])


def records(path):
    return {r["line"]: r for r in map(json.loads, path.read_bytes().splitlines())}


@pytest.mark.parametrize("kind", READ)
def test_utf_8_is_read_with_and_without_its_mark(kind, tmp_path):
    source = tmp_path / "in"
    source.write_bytes(READ[kind])
    lines = list(read_lines(source, {}))
    assert [line.prompt for line in lines] == PROMPTS and count_lines(source) == 3
    assert [line.number for line in lines] == [1, 3, 4]
    plain = tmp_path / "plain"
    plain.write_bytes(READ["utf-8"])
    assert [line.digest for line in lines] == [line.digest for line in read_lines(plain, {})]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_jsonl_is_refused_once(kind, tmp_path, capsys, llm):
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    data, message = REFUSED[kind]
    source.write_bytes(data)
    assert run(source, out) == 2 and not llm and not out.read_bytes()
    said = capsys.readouterr().err
    assert re.search(message, said)


def test_bad_lines_among_good_ones_stay_records(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    source.write_bytes(b'[1, 2]\n{"prompt": \n"abc"\n')
    assert run(source, out) == 0
    assert [r["error"] is None for _, r in sorted(records(out).items())] == [False, False, True]


def test_openai_lines_of_another_url_have_openai_records(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    line = {"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "x"}}
    source.write_text(json.dumps(line) + '\n{"prompt": ""}\n')
    assert run(source, out) == 1
    openai, plain = (record for _, record in sorted(records(out).items()))
    assert openai["id"] == "batch_req_1" and openai["response"] is None and openai["error"]["code"]
    assert plain["error"] and "response" not in plain


def test_a_quiet_run_has_no_bar_of_weights(tmp_path):
    source = tmp_path / "in"
    source.write_text('"abc"\n')
    transformers_logging.enable_progress_bar()
    try:
        assert run(source, tmp_path / "out.jsonl") == 0
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()


def test_a_folder_as_input_is_named_so(tmp_path, capsys):
    assert run(tmp_path, tmp_path / "out.jsonl") == 2
    assert "it is a folder" in capsys.readouterr().err


def test_a_run_that_serves_no_line_ends_with_1(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    source.write_text('{"prompt": ""}\n{"text": "abc"}\n')
    for _ in range(2):
        assert run(source, out) == 1, "also where the records are of an earlier run"
        assert "no line was served" in capsys.readouterr().err
    assert len(records(out)) == 2


@pytest.mark.parametrize(
    "changed, says",
    [
        (["--model", "other"], "model 'tiny', this run has 'other'"),
        (["--kv-format", "exact"], "kv_format 'auto', this run has 'exact'"),
        (["--temperature", "0.5"], "sampling temperature None, this run has 0.5"),
        (["--sampling-seed", "3"], "sampling seed"),
        (["--seed", "3"], "--seed None"),
        (["--dtype", "bfloat16"], "--dtype None"),
        (["-q", "fp8-emulated"], "--quantization None, this run has 'fp8-emulated'"),
        (["--exempt-layers", "0"], "--exempt-layers None, this run has [0]"),
    ],
)
def test_a_resume_with_something_else_is_refused(tmp_path, capsys, llm, changed, says):
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    source.write_text('"abc"\n')
    assert run(source, out, "--model", "tiny") == 0
    source.write_text('"abc"\n"def"\n')
    before, loads = out.read_bytes(), len(llm)
    assert run(source, out, "--model", "tiny", *changed) == 2
    said = capsys.readouterr().err
    assert says in said and "--resume-anyway" in said
    assert out.read_bytes() == before and len(llm) == loads
    assert run(source, out, "--model", "tiny", "--max-num-seqs", "2") == 0, "which changes no text"
    source.write_text('"abc"\n"def"\n"ghi"\n')
    assert run(source, out, "--model", "tiny", *changed, "--resume-anyway") == 0
    assert sorted(records(out)) == [1, 2, 3]
    assert [number for number, r in records(out).items() if "run" in r] == [1]
    assert run(source, out, "--model", "tiny", *changed, "--overwrite") == 0


def test_an_output_of_an_earlier_version_goes_on(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    source.write_text('"abc"\n"def"\n')
    first = next(read_lines(source, {}))
    out.write_text(json.dumps({"line": 1, "line_hash": first.digest, "error": None}) + "\n")
    assert run(source, out) == 0 and sorted(records(out)) == [1, 2]


def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args, **options):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    file = OutputFile(tmp_path / "out.jsonl")
    file.write({"line": 1, "line_hash": "x"})
    file.close()
    assert "cannot be locked (no flock here)" in caplog.text


def test_a_run_elsewhere_holds_the_lock(tmp_path):
    out = tmp_path / "out.jsonl"
    code = (
        "import sys; from pathlib import Path; from spectral_paged.batch.file import OutputFile\n"
        "file = OutputFile(Path(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(InvalidRequestError, match="another run writes"):
            OutputFile(out)
        other.kill()
    OutputFile(out).close()


def test_nothing_needs_a_unix_module():
    """Windows has no fcntl."""
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import spectral_paged.batch.run, spectral_paged.cli.commands"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
