"""A batch file over a Ray cluster gives the records of one process, even if workers die."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.batch.file import BatchLine, OutputFile
from spectral_paged.batch.run import LineResult
from spectral_paged.cli.commands import main
from spectral_paged.errors import ClusterError, InvalidRequestError, MissingPackageError
from spectral_paged.models.calibration import builtin_text, calibrate
from spectral_paged.models.loader import load_model
from support.served import letter_tokenizer, served_llm
from support.tiny_model import tiny_model

LINES = [{"prompt": f"Number {i} {'abc' * (i % 7)}", "id": f"id-{i}"} for i in range(60)]
LINES[5] = {"prompt": "", "id": "an empty one"}
LINES[9] = {"prompt": "x", "temprature": 1}
LINES[17] = {
    "custom_id": "chat",
    "url": "/v1/chat/completions",
    "body": {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 5,
        "n": 2,
        "temperature": 1.0,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(path)
    letter_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(folder, source, output, *extra):
    return main(
        [
            "generate",
            "--input",
            str(source),
            "--output",
            str(output),
            "--model",
            str(folder),
            "--device",
            "cpu",
            "--kv-cache-bytes",
            "16MiB",
            "--max-num-seqs",
            "4",
            "--temperature",
            "0",
            "--max-tokens",
            "60",
            *extra,
        ]
    )


def content(path):
    """Records by line, without what differs between runs; every line once."""
    found = {}
    for record in map(json.loads, path.read_text().splitlines()):
        assert record["line"] not in found, "a line was written twice"
        record.pop("metrics", None)
        record.pop("run", None)  # of the first one that was written
        if record.get("response"):
            record["response"]["body"].pop("created")
            record["response"]["body"]["usage"].pop("prompt_tokens_details")
        found[record["line"]] = record
    return found


def workers():
    """Processes of this test's cluster that run a `LineWorker`."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if "LineWorker" in " ".join(p.cmdline())]


def kill_one(output, killed):
    """Kill a worker when the first lines are written."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if output.exists() and output.read_bytes().count(b"\n") > 8:
            [victim, *_] = workers()
            os.kill(victim.pid, signal.SIGKILL)
            killed.append((victim.pid, output.read_bytes().count(b"\n")))
            return
        time.sleep(0.02)


def test_a_worker_that_is_killed_loses_and_doubles_no_line(folder, source, tmp_path):
    pytest.importorskip("ray.data")
    alone, output, killed = tmp_path / "alone.jsonl", tmp_path / "out.jsonl", []
    assert run(folder, source, alone) == 0
    # a torn output of an earlier run: two lines are done
    kept = b"".join(alone.read_bytes().splitlines(keepends=True)[:2])
    output.write_bytes(kept + b'{"line": 3, "li')
    killer = threading.Thread(target=kill_one, args=(output, killed))
    killer.start()
    assert run(folder, source, output, "--ray", "--ray-workers", "2") == 0
    killer.join()
    [(pid, num_lines)] = killed
    assert 8 < num_lines < len(LINES) and not psutil.pid_exists(pid)
    assert output.read_bytes().startswith(kept)
    assert content(output) == content(alone)
    assert sorted(content(output)) == list(range(1, len(LINES) + 1))
    assert not workers(), "the cluster is gone"


def test_relative_paths_begin_where_the_driver_runs(folder, tmp_path, monkeypatch):
    """Workers begin where the cluster was started, which is elsewhere; the records are the same."""
    ray = pytest.importorskip("ray")
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir(), elsewhere.mkdir()
    (place / "tiny").symlink_to(folder)
    loaded = load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    calibrate(loaded, [builtin_text()], max_spans=1).save(place / "basis.safetensors")
    lines = [LINES[0], LINES[17]]
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = ["--kv-format", "spectral-quality", "--calibration", "basis.safetensors"]
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        monkeypatch.chdir(place)
        assert run("tiny", "in.jsonl", "alone.jsonl", *shared) == 0
        assert run("tiny", "in.jsonl", "out.jsonl", *shared, "--ray", "--ray-workers", "1") == 0
    finally:
        ray.shutdown()
    assert content(place / "out.jsonl") == content(place / "alone.jsonl")
    assert content(place / "out.jsonl")[2]["response"]["body"]["model"] == "tiny"
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "given, told",
    [
        ("tiny", "{here}/tiny"),
        ("./tiny", "{here}/tiny"),
        ("none.gguf", "{here}/none.gguf"),
        ("../none", "{here}/../none"),
        ("~/none", "{home}/none"),
        ("/models/on/nodes", "/models/on/nodes"),
        ("org/name", "org/name"),
        ("smollm2-135m", "smollm2-135m"),
    ],
)
def test_workers_are_told_paths_that_mean_the_same_everywhere(tmp_path, monkeypatch, given, told):
    ray = ray_batches()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/driver")
    for name in ("tiny", "smollm2-135m"):  # an alias means the model, whatever lies there
        (tmp_path / name).mkdir()
    assert ray.absolute_model(given) == told.format(here=tmp_path, home="/home/driver")


def test_a_calibration_is_told_by_its_whole_path(tmp_path, monkeypatch):
    ray = ray_batches()
    monkeypatch.chdir(tmp_path)
    for given in ("basis", Path("basis")):
        options = {"seed": 1, "calibration": given}
        want = {"seed": 1, "calibration": str(tmp_path / "basis")}
        assert ray.absolute_options(options) == want
    for options in ({}, {"calibration": "auto"}, {"calibration": "online"}):
        assert ray.absolute_options(options) == options


def ray_batches():
    pytest.importorskip("ray.data")
    return importlib.import_module("spectral_paged.integrations.ray")


def test_lines_that_kill_every_worker_end_the_run(monkeypatch):
    ray = ray_batches()
    monkeypatch.setattr("spectral_paged.llm.LLM", lambda model, **options: served_llm())
    worker = ray.LineWorker("tiny", {}, ray.Attempts().take)
    lines = [BatchLine(number, "", prompt="ab", params=SamplingParams()) for number in (7, 8)]
    batch = {"line": [pickle.dumps(line) for line in lines]}
    for _ in range(ray.MAX_ATTEMPTS):
        assert sum(worker(batch)["num_tokens"]) == 32
    with pytest.raises(ClusterError, match="workers died over lines 7 to 8"):
        worker(batch)


def test_workers_that_die_while_they_load_end_the_run(monkeypatch):
    ray = ray_batches()
    monkeypatch.setattr("spectral_paged.llm.LLM", lambda model, **options: served_llm())
    take = ray.Attempts().take
    for _ in range(2 * ray.MAX_ATTEMPTS):
        worker = ray.LineWorker("tiny", {}, take, 2 * ray.MAX_ATTEMPTS)
    with pytest.raises(ClusterError, match="while they loaded 'tiny', 8 times"):
        ray.LineWorker("tiny", {}, take, 2 * ray.MAX_ATTEMPTS)
    worker({"line": [pickle.dumps(BatchLine(7, "", prompt="ab", params=SamplingParams()))]})
    ray.LineWorker("tiny", {}, take, 2 * ray.MAX_ATTEMPTS)  # somebody has loaded: all is well


@pytest.fixture
def no_cluster(monkeypatch):
    """The driver's part alone: blocks are tables, a test says what comes back."""
    ray = ray_batches()
    monkeypatch.setattr(ray, "_joined", lambda address: nullcontext())
    monkeypatch.setattr(ray.ray, "put", lambda table: table)
    monkeypatch.setattr(ray.ray, "cluster_resources", lambda: {"CPU": 2.0})
    return ray


def answers(blocks, fail=False):
    for block in blocks:
        for line in map(pickle.loads, block["line"].to_pylist()):
            yield LineResult({"line": line.number, "line_hash": line.digest}, fail, 1)


def run_driver(ray, source, output, **options):
    file = OutputFile(output)
    values = {"options": {"max_num_seqs": 4}, "num_workers": 2, "quiet": True} | options
    try:
        return ray.run_batch("tiny", source, file, {}, **values)
    finally:
        file.close()


def test_a_block_that_comes_back_twice_is_written_once(no_cluster, source, tmp_path, monkeypatch):
    def twice(blocks, *_):
        assert [len(b) for b in blocks] == [3] * 19 + [2], "sixteen blocks or more"
        yield from answers(blocks[:3])
        yield from answers(blocks[1:] + blocks[:2])

    monkeypatch.setattr(no_cluster, "_results", twice)
    summary = run_driver(no_cluster, source, tmp_path / "out.jsonl")
    assert sorted(content(tmp_path / "out.jsonl")) == list(range(1, len(LINES) + 1))
    assert (summary.done, summary.failed, summary.generated_tokens) == (59, 1, 59)
    monkeypatch.setattr(no_cluster, "_results", None)
    again = run_driver(no_cluster, source, tmp_path / "out.jsonl")
    assert (again.skipped, again.done) == (60, 0), "nothing is left to send"


def test_a_line_that_does_not_come_back_is_told(no_cluster, source, tmp_path, monkeypatch):
    monkeypatch.setattr(no_cluster, "_results", lambda blocks, *_: answers(blocks[1:]))
    with pytest.raises(ClusterError, match="3 lines came back from no worker, line 1 the first"):
        run_driver(no_cluster, source, tmp_path / "out.jsonl")
    assert len(content(tmp_path / "out.jsonl")) == len(LINES) - 3


def test_a_cluster_that_gives_up_says_what_a_worker_raised(
    no_cluster, source, tmp_path, monkeypatch
):
    def gives_up(blocks, *_):
        yield from answers(blocks[:1])
        raise no_cluster.ray.exceptions.RayError(
            "ray::MapWorker()\n  File 'x.py'\nOSError: inner\n\nThe above\n"
            "spectral_paged.errors.UnknownModelError: unknown model 'm'\n"
            "ray.exceptions.UserCodeException: UDF failed\nTo change attempts: do"
        )

    monkeypatch.setattr(no_cluster, "_results", gives_up)
    with pytest.raises(ClusterError, match=r"56 lines .* gave up: \S+UnknownModelError: unknown"):
        run_driver(no_cluster, source, tmp_path / "out.jsonl")
    assert len(content(tmp_path / "out.jsonl")) == 4, "what came before is kept"


@pytest.mark.parametrize(
    "found, device, wanted, message",
    [
        ({"CPU": 8.0}, "auto", None, "say how many with --ray-workers"),
        ({"CPU": 8.0}, "auto", 9, "has 8 CPU"),
        ({"CPU": 8.0, "GPU": 2.0}, "auto", 3, "has 2 GPU"),
        ({"CPU": 8.0, "GPU": 2.0}, "cpu", None, "say how many with --ray-workers"),
        ({"CPU": 8.0, "GPU": 2.0}, "cuda", None, ("GPU", 2)),
        ({"CPU": 8.0, "GPU": 2.0}, "cpu", 3, ("CPU", 3)),
    ],
)
def test_workers_are_as_many_as_the_cluster_has_room_for(
    no_cluster, monkeypatch, found, device, wanted, message
):
    monkeypatch.setattr(no_cluster.ray, "cluster_resources", lambda: found)
    if isinstance(message, tuple):
        assert no_cluster._workers(device, wanted) == message
        return
    with pytest.raises(InvalidRequestError, match=message):
        no_cluster._workers(device, wanted)


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--ray-workers", "2"], "need --ray"),
        (["--ray", "--top"], "with --ray there are several"),
        (["--ray", "--metrics-port", "0"], "with --ray there are several"),
    ],
)
def test_options_that_do_not_go_together_are_refused(source, tmp_path, capsys, extra, message):
    assert run("none", source, tmp_path / "out.jsonl", *extra) == 2
    assert message in capsys.readouterr().err


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "spectral_paged.integrations.ray", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[ray\]'"):
        importlib.import_module("spectral_paged.integrations.ray")
