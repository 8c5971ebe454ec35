"""`bench throughput`: its requests, its figures, and the clock of a step."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from spectral_paged.benchmarks.throughput import backends, random_models, run, suites
from spectral_paged.benchmarks.throughput.backends import (
    engine_of,
    serve_with_generate,
    serve_with_pages,
)
from spectral_paged.benchmarks.throughput.random_models import load_random
from spectral_paged.benchmarks.throughput.vllm_server import check_backend
from spectral_paged.benchmarks.throughput.workload import Job, WorkloadOptions, jobs_of
from spectral_paged.device import StepClock
from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.fp8_linear import FP8Linear
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from spectral_paged.sampling import SamplingParams
from support.tiny_model import VOCAB, tiny_llm, tiny_model


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text):
        return {"input_ids": [len(word) % VOCAB for word in text.split()]}


def loaded():
    model = tiny_model()
    return LoadedModel("tiny", model, None, ModelGeometry.from_config(model.config))


def jobs(**options):
    return jobs_of(WorkloadOptions(**options), VOCAB, 4096, Words())


# ---- requests ----------------------------------------------------------------------------


def test_random_lengths_stay_in_their_range_and_follow_the_seed():
    options = {"num_prompts": 200, "input_len": 100, "output_len": 40, "range_ratio": 0.25}
    found = jobs(**options)
    lengths = [len(job.prompt_token_ids) for job in found]
    assert min(lengths) < 80 and max(lengths) > 120
    assert all(75 <= n <= 125 for n in lengths)
    assert all(30 <= job.output_len <= 50 for job in found)
    assert all(0 <= t < VOCAB for job in found for t in job.prompt_token_ids)
    assert jobs(**options) == found != jobs(**options, seed=1)


def test_repeated_prefixes_are_shared_and_what_follows_is_not():
    found = jobs(
        dataset="prefix_repetition", num_prompts=6, input_len=30, prefix_len=50, num_prefixes=2
    )
    heads = [tuple(job.prompt_token_ids[:50]) for job in found]
    assert heads[0::2] == [heads[0]] * 3 and heads[1::2] == [heads[1]] * 3 and len(set(heads)) == 2
    assert len({tuple(job.prompt_token_ids[50:]) for job in found}) == 6
    assert {len(job.prompt_token_ids) for job in found} == {80}


def test_conversations_give_prompts_and_lengths_and_odd_ones_are_passed_over(tmp_path):
    path = tmp_path / "talk.jsonl"
    lines = [
        {"conversations": [{"value": "one two three four five"}, {"value": "a b c d e f"}]},
        {"conversations": [{"value": "too short"}, {"value": "a b c d e f"}]},
        {"prompt": "one two three four", "answer": "a b c d"},
        {"prompt": "word " * 5000, "answer": "a b c d"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = jobs(dataset="sharegpt", dataset_path=path)
    assert [(len(j.prompt_token_ids), j.output_len) for j in found] == [(5, 6), (4, 4)]
    fixed = jobs(dataset="sharegpt", dataset_path=path, output_len=9, num_prompts=1)
    assert [(len(j.prompt_token_ids), j.output_len) for j in fixed] == [(5, 9)]


@pytest.mark.parametrize(
    "options, text, message",
    [
        ({"dataset": "sonnet"}, None, "use random, sharegpt"),
        ({"dataset": "sharegpt"}, None, "needs --dataset-path"),
        ({"dataset": "sharegpt"}, "not json", "talk.jsonl:1 is no conversation"),
        ({"dataset": "sharegpt"}, '{"prompt": "x"}', "no conversation that fits"),
        ({"input_len": 5000}, None, "lower --input-len"),
    ],
)
def test_workloads_that_cannot_run_are_refused_with_what_to_do(tmp_path, options, text, message):
    if text is not None:
        path = tmp_path / "talk.jsonl"
        path.write_text(text)
        options = options | {"dataset_path": path}
    with pytest.raises(InvalidRequestError, match=message):
        jobs(**options)


# ---- runs --------------------------------------------------------------------------------


def test_a_run_writes_the_keys_of_vllm_and_counts_every_token(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_models, "load_model", lambda *args, **options: loaded())
    options = run.Options(
        model="tiny",
        workload=WorkloadOptions(num_prompts=5, input_len=60, output_len=7, range_ratio=0.3),
        backends=("exact", "spectral-int8", "transformers", "transformers-continuous"),
        device="cpu",
        dtype="float32",
        max_num_seqs=(2, 4),
        kv_cache_bytes=16 << 20,
        max_num_batched_tokens=256,
        output_dir=tmp_path,
    )
    assert run.main(options) == 0
    result = json.loads((tmp_path / "throughput-tiny.json").read_text())
    assert [(r["backend"], r["max_num_seqs"]) for r in result["rows"]] == [
        (b, n) for b in options.backends for n in (2, 4)
    ]
    wanted = jobs_of(options.workload, VOCAB, 4096, None)
    outputs = sum(job.output_len for job in wanted)
    total = outputs + sum(len(job.prompt_token_ids) for job in wanted)
    for row in result["rows"]:
        assert row["num_requests"] == 5 and row["total_num_tokens"] == total
        assert row["tokens_per_second"] == pytest.approx(total / row["elapsed_time"])
        assert row["requests_per_second"] == pytest.approx(5 / row["elapsed_time"])
        assert row["output_tokens_per_second"] == pytest.approx(outputs / row["elapsed_time"])
        assert (row["ttft_ms"] is None) == row["backend"].startswith("transformers")
    ours = result["rows"][0]
    assert 0 < ours["ttft_ms"]["p50"] <= ours["ttft_ms"]["p99"] <= ours["ttft_ms"]["max"]
    assert ours["itl_ms"]["max"] * 1e-3 <= ours["elapsed_time"]
    assert (tmp_path / "throughput-tiny.png").stat().st_size > 1000
    assert "output tokens/s" in capsys.readouterr().out


def test_a_run_over_several_prompt_lengths_has_a_row_and_a_point_for_each(tmp_path):
    options = run.Options(
        model="tiny",
        workload=WorkloadOptions(num_prompts=2, output_len=3),
        backends=("exact",),
        device="cpu",
        dtype="float32",
        input_lens=(20, 90),
        max_num_seqs=(1, 2),
        kv_cache_bytes=16 << 20,
        output_dir=tmp_path,
    )
    assert run.main(options, loaded()) == 0
    rows = json.loads((tmp_path / "throughput-tiny.json").read_text())["rows"]
    found = [(r["input_len"], r["max_num_seqs"], r["total_num_tokens"]) for r in rows]
    assert found == [(n, b, 2 * (n + 3)) for n in (20, 90) for b in (1, 2)]
    for over in ("", "-over-input-len"):
        assert (tmp_path / f"throughput-tiny{over}.png").stat().st_size > 1000


def test_a_table_may_be_measured_in_several_runs_of_the_same_workload(tmp_path):
    options = run.Options(
        model="tiny",
        workload=WorkloadOptions(num_prompts=2, input_len=20, output_len=3),
        backends=("exact", "spectral-int8"),
        device="cpu",
        dtype="float32",
        kv_cache_bytes=16 << 20,
        output_dir=tmp_path,
    )
    model = loaded()
    assert run.main(options, model) == 0
    before = json.loads((tmp_path / "throughput-tiny.json").read_text())["rows"]
    again = replace(options, backends=("exact",), append=True)
    assert run.main(again, model) == 0
    rows = json.loads((tmp_path / "throughput-tiny.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == ["spectral-int8", "exact"]
    assert rows[0] == before[1] and rows[1] != before[0]
    other = replace(again, workload=replace(options.workload, output_len=4))
    with pytest.raises(InvalidRequestError, match="measured with another workload: give another"):
        run.main(other, model)
    assert json.loads((tmp_path / "throughput-tiny.json").read_text())["rows"] == rows


def test_a_profiled_run_says_where_its_time_went():
    work = [Job(list(range(3, 33)), 4), Job([i % VOCAB for i in range(700)], 4)]
    served = serve_with_pages(
        loaded(),
        work,
        kv_format="spectral-int8",
        options={"kv_cache_bytes": 16 << 20},
        profile=True,
    )
    spent = served.breakdown
    assert all(spent[name] > 0 for name in ("schedule", "commit", "model", "attention", "seal"))
    assert sum(spent.values()) < served.elapsed
    assert len(served.first) == 2 and len(served.gaps) == 6


def test_percentiles_are_values_that_were_seen():
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert run.percentile(values, 0.5) == 3.0 and run.percentile(values, 0.99) == 5.0
    assert run.latency([]) is None and run.latency([0.002])["p99"] == pytest.approx(2.0)


# ---- the clock ---------------------------------------------------------------------------


def test_a_section_is_counted_without_what_runs_inside_of_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))
    with clock.section("model"):
        now[0] += 1
        with clock.section("attention"):
            now[0] += 10
        now[0] += 2
    now[0] += 100
    with pytest.raises(KeyError), clock.section("seal"):
        now[0] += 5
        raise KeyError
    assert clock.seconds == dict.fromkeys(clock.seconds, 0.0) | {
        "model": 3.0,
        "attention": 10.0,
        "seal": 5.0,
    }


def test_a_clock_that_is_off_counts_nothing():
    clock = StepClock()
    with clock.section("model"):
        time.sleep(0.001)
    assert not any(clock.seconds.values())


def test_an_engine_times_its_caches_sections_by_its_own_clock():
    llm, clock = tiny_llm(), StepClock(torch.device("cpu"))
    llm.engine.use_clock(clock)
    params = SamplingParams(temperature=0.0, max_tokens=2)
    llm.generate([[1 + i % 90 for i in range(1500)]], params, use_tqdm=False)
    assert llm.engine.clock is clock and all(clock.seconds.values())


# ---- decode alone, suites ----------------------------------------------------------------


@pytest.mark.parametrize("format", ["exact", "auto", "spectral-int8-post"])
def test_decode_alone_runs_the_model_for_decode_steps_only(format):
    tiny = load_random("random:tiny", device=torch.device("cpu"), dtype=torch.float32)
    lengths, forward = [], tiny.model.forward

    def counted(**arguments):
        lengths.append(arguments["input_ids"].shape[1])
        return forward(**arguments)

    tiny.model.forward = counted
    options = {"kv_cache_bytes": 24 << 20, "max_model_len": 2048, "enable_prefix_caching": False}
    found = serve_with_pages(
        tiny,
        [Job([1] * 1500, 30)] * 40,
        kv_format=format,
        options=options,
        decode_only=True,
        fit=True,
    )
    count = len(found.jobs)
    warm_up = lengths.index(1500) + 1 if 1500 in lengths else 0
    assert 2 < count < 40 and max(lengths[warm_up:]) <= count
    assert found.decode_rate > 0 and found.stats["most_running"] == count
    assert (found.stats["pages_sealed"] >= count * 2 * 2) == (format != "exact")
    assert (found.stats["seal_backend"] == "copy") == (format != "exact")


def test_the_suite_refuses_what_it_does_not_have(tmp_path):
    for name, only in (("9b", []), ("8b", ["no-such"])):
        with pytest.raises(InvalidRequestError, match="8b"):
            suites.main(name, only=only, output_dir=tmp_path)


@pytest.mark.parametrize("given, used", [(None, "bitsandbytes"), ("fp8", "fp8")])
def test_the_suite_of_four_bits_caps_memory_and_quantizes(tmp_path, monkeypatch, given, used):
    seen = []
    monkeypatch.setattr(run, "load", lambda options: seen.append(options))
    monkeypatch.setattr(run, "Report", lambda options, loaded: options)
    monkeypatch.setattr(run, "measure_all", lambda reports, loaded: seen.extend(reports))
    assert suites.main("8b-4bit", only=[], quantization=given, output_dir=tmp_path) == 0
    for options in seen:
        assert options.quantization == used and options.workload.input_len == 8192
        assert options.gpu_memory_utilization * 141 == pytest.approx(24, abs=0.1)
        assert options.backends == ("exact", "spectral-quality") and options.fit
        assert options.max_num_seqs == (options.workload.num_prompts,)
    assert seen[1].name == "8b-4bit-8k-24gb" + ("-fp8" if given else "")


def test_a_suite_without_a_quantization_has_none(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "load", lambda options: seen.append(options))
    monkeypatch.setattr(run, "Report", lambda options, loaded: options)
    monkeypatch.setattr(run, "measure_all", lambda reports, loaded: seen.extend(reports))
    suites.main("8b", only=["8k-24gb"], output_dir=tmp_path)
    assert [options.quantization for options in seen] == [None, None]


def test_baselines_run_the_model_as_it_came(monkeypatch):
    """A model that an engine served, and compiled, is not what transformers' own loops are timed
    on."""
    tiny = loaded()
    attention, norm = tiny.model.config._attn_implementation, tiny.model.model.norm

    def compiling(*args):
        llm = engine_of(*args)
        norm._compiled_call_impl = norm._call_impl  # as `compile` does on a GPU
        assert tiny.model.config._attn_implementation != attention
        return llm

    monkeypatch.setattr(backends, "engine_of", compiling)
    options = {"kv_cache_bytes": 16 << 20}
    serve_with_pages(tiny, [Job([1, 2, 3], 4)], kv_format="exact", options=options)
    assert tiny.model.config._attn_implementation == attention
    assert norm._compiled_call_impl is None
    assert serve_with_generate(tiny, [Job([1, 2, 3], 4)], batch_size=1).elapsed > 0


# ---- quantized weights -------------------------------------------------------------------


def fp8_run(tmp_path, *backends, method="fp8-emulated"):
    return run.Options(
        model="tiny",
        workload=WorkloadOptions(num_prompts=3, input_len=40, output_len=3),
        backends=backends,
        device="cpu",
        quantization=method,
        kv_cache_bytes=16 << 20,
        output_dir=tmp_path,
    )


def test_all_backends_of_a_run_serve_the_same_quantized_weights(tmp_path, monkeypatch):
    base = loaded()
    monkeypatch.setattr(random_models, "load_model", lambda *args, **options: base)
    assert run.main(fp8_run(tmp_path, "exact", "transformers")) == 0
    result = json.loads((tmp_path / "throughput-tiny.json").read_text())
    assert result["quantization"] == "fp8-emulated"
    assert result["rows"][0]["stats"]["quantization"] == "fp8-emulated"
    assert type(base.model.model.layers[1].mlp.up_proj) is FP8Linear


@pytest.mark.parametrize("preset, count", [("exact", 0), ("spectral-int8", 1)])
def test_a_calibration_is_made_before_weights_are_quantized(tmp_path, monkeypatch, preset, count):
    made = []
    monkeypatch.setattr(random_models, "load_model", lambda *args, **options: loaded())
    monkeypatch.setattr(run, "needs_calibration", lambda name: name != "exact")
    monkeypatch.setattr(run, "builtin_calibration", lambda one: made.append(one.quantization))
    assert run.load(fp8_run(tmp_path, preset, "transformers", "vllm")).quantization
    assert made == [None] * count


@pytest.mark.parametrize(
    "method, backend, message",
    [
        ("fp9", "exact", "did you mean 'fp8'"),
        ("fp8", "exact", "needs a GPU of compute capability 8.9"),
        ("fp8", "vllm", "needs a GPU of compute capability 8.9"),
        ("fp8-emulated", "vllm:fp8", "vllm:fp8 has no --quantization fp8-emulated: take fp8"),
        ("fp8-emulated", "transformers", None),
    ],
)
def test_a_run_refuses_a_quantization_that_its_backends_have_not(
    tmp_path, monkeypatch, method, backend, message
):
    monkeypatch.setattr(random_models, "load_model", lambda *args, **options: loaded())
    options = fp8_run(tmp_path, backend, method=method)
    if message is None:
        assert run.main(options) == 0
        return
    with pytest.raises(InvalidRequestError, match=message):
        run.main(options)
    assert not list(tmp_path.iterdir()), "nothing was measured"


@pytest.mark.parametrize("backend, calibrated", [("vllm-pages", 1), ("vllm-pages:exact", 0)])
def test_pages_in_vllm_are_not_calibrated_on_quantized_weights(backend, calibrated):
    check = partial(check_backend, backend, decode_only=False, profile=False)
    check(quantization=None)
    if not calibrated:
        check(quantization="fp8")
        return
    with pytest.raises(InvalidRequestError, match="makes its calibration of vLLM's weights"):
        check(quantization="fp8")
