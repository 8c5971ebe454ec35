"""Pages inside vLLM on a machine without a card: vLLM's own scheduler over a real cache.

`make vllm` runs this file and `vllm_store_host_cases.py`, with a release of vLLM beside the
package; `make test` does not, because that release is a wheel of 300 MB.
"""

from __future__ import annotations

import copy
import inspect
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from spectral_paged.cache.sealer import SealCheck
from spectral_paged.errors import InvalidRequestError
from spectral_paged.integrations.vllm import engine_args, serve_flags
from spectral_paged.integrations.vllm.limits import check_limits, obstacles
from spectral_paged.kernels.chunk import fa3
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.math.scores import Scores
from support.vllm_host import (
    LONGEST,
    EngineArgs,
    FlexibleArgumentParser,
    Host,
    SpectralCudaGraphs,
    engine_config,
    flash_attention,
    model_folder,
    tokens,
)

pytest_plugins = ["support.vllm_host"]
# with prefix caching, without, and with host memory that a few prompts fill
KEEPING = (
    {"enable_prefix_caching": True},
    {"enable_prefix_caching": False},
    {"enable_prefix_caching": True, "kv_host_memory": 3 << 20},
)


@pytest.mark.parametrize("graphs", [False, True])
def test_exact_pages_attend_as_dense_attention_does(folder, graphs):
    host = Host(
        folder, format="exact", graphs=graphs, check_dense=True, enable_prefix_caching=False
    )
    host.add(*(host.request(f"r{i}", tokens(150 + 170 * i, i), 40) for i in range(3)))
    host.finish()
    assert host.worst < 1e-5 and host.num_steps >= 40


@pytest.mark.parametrize("graphs", [False, True])
def test_blocks_become_pages_that_later_steps_read(folder, graphs):
    host = Host(folder, graphs=graphs, megabytes=64)
    common = tokens(2500)
    requests = [host.request(f"r{i}", common + tokens(300 + 40 * i, i), 60) for i in range(6)]
    host.add(*requests)
    host.finish()
    stats = host.runtime.stats()
    assert stats["pages_sealed"] > 0 and stats["pages_attended"] > 0
    assert [len(r.output_token_ids) for r in requests] == [60] * 6
    assert host.num_preempted == 0
    before = host.runtime.stats()["prefix_hit_tokens"]
    late = [host.request(f"s{i}", common + tokens(100, 90 + i), 20) for i in range(3)]
    host.add(*late)
    host.finish()
    # in steps of 64 tokens, where vLLM's blocks of 512 would give 2,048
    assert host.runtime.stats()["prefix_hit_tokens"] == before + 3 * 2496


def test_too_little_memory_preempts_and_every_request_ends(folder):
    host = Host(folder, megabytes=5)
    requests = [host.request(f"r{i}", tokens(700 + 97 * i, i), 700) for i in range(6)]
    host.add(*requests)
    for _ in range(40):
        host.step()
    host.abort("r3")
    host.finish()
    assert host.num_preempted > 0
    assert [len(r.output_token_ids) for r in requests if r.request_id != "r3"] == [700] * 5


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_order_of_requests_aborts_and_late_samples_leaves_nothing(folder, data):
    """Integrity is checked after every step."""
    host = Host(
        folder,
        megabytes=data.draw(st.sampled_from([5, 8, 24])),
        graphs=data.draw(st.booleans()),
        max_num_seqs=data.draw(st.sampled_from([2, 8])),
        **data.draw(st.sampled_from(KEEPING)),
        scheduling_policy=data.draw(st.sampled_from(["fcfs", "priority"])),
    )
    made = 0
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["add", "add", "step", "late", "abort", "reset"]))
        if what == "add":
            length = data.draw(st.sampled_from([1, 63, 64, 576, 577, 1300, 3000]))
            length = min(length, host.cache.max_sequence_tokens - 80)
            host.add(
                host.request(
                    f"r{made}",
                    tokens(length, data.draw(st.integers(0, 2))),
                    data.draw(st.integers(1, 80)),
                    salt=data.draw(st.sampled_from([None, "a"])),
                    priority=data.draw(st.integers(0, 2)),
                )
            )
            made += 1
        elif what == "abort" and made:
            host.abort(f"r{data.draw(st.integers(0, made - 1))}")
        elif what == "reset":
            host.scheduler.reset_prefix_cache(reset_running_requests=data.draw(st.booleans()))
        else:
            for _ in range(data.draw(st.integers(1, 30))):
                if host.scheduler.has_requests():
                    host.step(sample_late=what == "late")
    host.finish(sample_late=data.draw(st.booleans()))


def test_vllms_flash_attention_3_is_called_by_its_own_names(monkeypatch):
    calls = []
    takes = inspect.signature(flash_attention.flash_attn_varlen_func)

    def record(*args, **options):
        calls.append(takes.bind(*args, **options).arguments)
        return args[0]

    monkeypatch.setattr(flash_attention, "flash_attn_varlen_func", record)
    spans = ChunkSpans.of([2, 3], [5, 3], torch.device("cpu"), gap=4)
    q, k = torch.zeros(5, 4, 64), torch.zeros(spans.num_key_rows, 2, 64)
    assert flash_attention.BUILD.attend(q, k, k, spans, Scores(0.5, 7.0), (49, 0)) is q
    (found,) = calls
    assert found["cu_seqlens_q"].tolist() == [0, 2, 2, 5]
    assert found["cu_seqlens_k"].tolist() == [0, 5, 9, 12]
    rest = {name: x for name, x in found.items() if not isinstance(x, torch.Tensor)}
    assert rest == {
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
        "softmax_scale": 0.5,
        "causal": True,
        "window_size": [49, 0],
        "softcap": 7.0,
        "num_splits": 1,
        "fa_version": 3,
    }


@pytest.mark.parametrize("reason", [None, "no card"])
def test_vllms_build_is_taken_where_vllm_has_it(monkeypatch, reason):
    monkeypatch.setattr(flash_attention, "fa_version_unsupported_reason", lambda version: reason)
    try:
        flash_attention.use_vllm_build()
        assert (fa3.build_in_use() is flash_attention.BUILD) == (reason is None)
    finally:
        fa3.use_build(None)


def test_one_bad_request_ends_alone_with_an_error(folder):
    host = Host(folder)
    requests = [host.request(f"r{i}", tokens(1500, i), 30) for i in range(3)]
    host.bad_token = "r1"
    host.add(*requests)
    host.finish()
    assert list(host.errors) == ["r1"]
    assert [len(r.output_token_ids) for r in requests if r.request_id != "r1"] == [30, 30]
    host.bad_token = None
    host.add(host.request("again", tokens(1500, 1), 5))  # the bad blocks are found by nobody
    host.finish()
    assert list(host.errors) == ["r1"]


@pytest.mark.parametrize(
    "one, other, shared",
    [
        ({}, {}, True),
        ({"salt": "a"}, {"salt": "a"}, True),
        ({"salt": "a"}, {}, False),
        ({"lora": "x"}, {}, False),
        ({"lora": "x"}, {"lora": "x"}, True),
        ({"lora": "x"}, {"salt": "/lora x"}, False),
        ({"lora": "x"}, {"salt": "('', 'x', None)"}, False),
        ({"prompt_logprobs": 1}, {"prompt_logprobs": 1}, False),
    ],
)
def test_only_requests_of_one_salt_share_a_prefix(folder, one, other, shared):
    host = Host(folder)
    prompt = tokens(1000)
    host.add(host.request("one", prompt, 4, **one))
    host.finish()
    host.add(host.request("other", prompt, 4, **other))
    host.finish()
    assert (host.runtime.stats()["prefix_hit_tokens"] > 0) == shared


def preempt(host, name):
    request = host.scheduler.requests[name]
    host.scheduler.running.remove(request)
    host.scheduler._preempt_request(request, 0.0)


def test_log_probs_of_a_prompt_are_computed_again_after_a_preemption(folder):
    host = Host(folder)
    host.add(host.request("r", tokens(1500), 20, prompt_logprobs=1))
    for _ in range(8):
        host.step(depth=1)
    assert host.computed["r"] > 1500
    preempt(host, "r")
    host.step(depth=1)
    assert host.computed["r"] == 0
    host.finish()


def test_a_reset_says_no_while_requests_hold_what_others_can_hit(folder):
    host = Host(folder)
    prompt = tokens(1000)
    host.add(host.request("one", prompt, 40))
    for _ in range(6):
        host.step()
    assert not host.scheduler.reset_prefix_cache()
    assert host.scheduler.reset_prefix_cache(reset_running_requests=True)
    host.add(host.request("other", prompt[:-1] + [5], 4))
    before = host.runtime.stats()["prefix_hit_tokens"]
    host.step()  # both are admitted, and neither finds what was computed before
    assert host.computed.keys() == {"one", "other"} and not any(host.computed.values())
    assert host.runtime.stats()["prefix_hit_tokens"] == before
    host.finish()
    assert host.scheduler.reset_prefix_cache()


def test_of_the_requests_that_were_looked_up_and_wait_one_is_held(folder):
    """Without chunked prefill, a prompt waits for a whole step's budget after its look-up."""
    host = Host(
        folder,
        max_num_seqs=4,
        megabytes=64,
        enable_chunked_prefill=False,
        max_num_batched_tokens=LONGEST,
        scheduling_policy="priority",
    )
    for i in range(3):
        host.add(host.request(f"r{i}", tokens(7000, i), 3, priority=9 - i))
        host.step()
        assert host.cache.num_sequences <= len(host.scheduler.running) + 1
    for i in range(3):
        host.abort(f"r{i}")
    host.finish()


def test_the_longest_request_fits_alone_after_a_hit_too(folder):
    host = Host(folder, megabytes=3)
    longest = host.cache.max_sequence_tokens
    assert longest < 8000  # memory bounds it
    prompt = tokens(longest - 8)
    for i in range(3):
        host.add(host.request(f"r{i}", prompt, 8))
        host.finish()
    host.add(host.request("half", prompt[: longest // 2], 8), host.request("again", prompt, 8))
    host.finish()


def test_a_session_that_is_continued_goes_on_from_its_tokens(folder):
    host = Host(folder, format="exact", check_dense=True, enable_prefix_caching=False)
    session = host.request("s", tokens(700), 5)
    session.resumable = True
    host.add(session)
    for _ in range(20):
        host.step()
    more = host.request("s", tokens(900, 1), 7)
    more.resumable = True
    host.add(more)
    for _ in range(20):
        host.step()
    assert session.num_prompt_tokens > 1600 and len(session.output_token_ids) == 5
    host.abort("s")
    host.finish()
    assert host.worst < 1e-5


def test_a_failure_that_a_preemption_finds_ends_its_request_alone(folder, monkeypatch):
    """A free waits for the checks of all blocks that were sealed with the freed sequence's."""
    monkeypatch.setattr(SealCheck, "is_known", False)  # as while the device is busy
    host = Host(folder)
    requests = [host.request(f"r{i}", tokens(1500, i), 30) for i in range(3)]
    host.bad_token = "r2"
    host.add(*requests)
    begin = host.scheduler.kv_cache_manager.new_step_starts

    def new_step_starts():
        begin()
        if host.runtime.stats()["pages_sealed"] and not requests[0].num_preemptions:
            preempt(host, "r0")

    monkeypatch.setattr(host.scheduler.kv_cache_manager, "new_step_starts", new_step_starts)
    host.finish(depth=1)
    assert list(host.errors) == ["r2"]
    assert requests[0].num_preemptions == 1
    assert [len(r.output_token_ids) for r in requests[:2]] == [30, 30]


def test_a_prompt_waits_until_it_fits_beside_those_that_run(folder):
    """Admitted chunk by chunk, prompts would preempt each other."""
    host = Host(folder, megabytes=12, format="exact", enable_prefix_caching=False)
    host.add(*(host.request(f"r{i}", tokens(4000, i), 4) for i in range(4)))
    host.finish()
    assert host.num_preempted == 0


def test_more_requests_than_rows_wait(folder):
    host = Host(folder, max_num_seqs=2)
    requests = [host.request(f"r{i}", tokens(100, i), 5) for i in range(7)]
    host.add(*requests)
    host.finish()
    assert [len(r.output_token_ids) for r in requests] == [5] * 7


def test_the_host_time_of_a_step_is_counted(folder):
    host = Host(folder)
    host.add(host.request("r", tokens(100), 5))
    host.finish()
    stats = host.runtime.stats()
    assert stats["num_steps"] == host.num_steps and 0 < stats["host_seconds"] < 5
    assert 0 < stats["decode_host_ms"] < 1e3 * stats["host_seconds"]


@pytest.mark.parametrize(
    "part, changes, words",
    [
        ("parallel_config", {"world_size": 2}, "tensor_parallel_size"),
        ("parallel_config", {"data_parallel_size": 2}, "data_parallel_size"),
        ("parallel_config", {"worker_cls": "auto"}, "worker_cls"),
        ("cache_config", {"cache_dtype": "fp8"}, "kv_cache_dtype"),
        ("cache_config", {"kv_offloading_size": 4.0}, "kv_offloading_size"),
        ("cache_config", {"num_gpu_blocks_override": None}, "num_gpu_blocks_override"),
        ("scheduler_config", {"async_scheduling": False}, "async-scheduling"),
        ("scheduler_config", {"scheduler_cls": None}, "scheduler_cls"),
        ("model_config", {"enable_sleep_mode": True}, "enable_sleep_mode"),
        ("scheduler_config", {"watermark": 0.1}, "watermark"),
        ("model_config", {"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ("model_config", {"is_encoder_decoder": True}, "text"),
        ("", {"speculative_config": MagicMock(method="ngram")}, "speculative_config"),
        ("", {"kv_transfer_config": object()}, "kv_transfer_config"),
    ],
)
def test_what_is_not_served_is_refused_by_name(folder, part, changes, words):
    config = copy.copy(engine_config(folder))
    changed = copy.copy(getattr(config, part)) if part else config
    for name, value in changes.items():
        changed.__dict__[name] = value
    if part:
        config.__dict__[part] = changed
    others = [o for o in obstacles(config) if words not in o]
    assert [o for o in others if "runner V1" not in o] == []  # which vLLM itself falls back to
    with pytest.raises(InvalidRequestError, match=words):
        check_limits(config)


def test_a_family_that_vllm_runs_by_transformers_is_refused(tmp_path):
    other = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    config = engine_config(model_folder(tmp_path, **other))
    with pytest.raises(InvalidRequestError, match="Olmo2ForCausalLM"):
        check_limits(config)


def test_a_config_of_engine_args_is_served(folder):
    check_limits(engine_config(folder))


def test_the_flags_of_serve_say_what_engine_args_says(folder):
    options = {"kv_format": "exact", "prefill_segment": 1024, "exempt_layers": (0, 5)}
    options |= {"kv_host_memory": "2GiB", "kv_store": "/pages", "kv_store_size": 1 << 40}
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = serve_flags(folder, max_num_seqs=32, **options)[1:]
    parsed = EngineArgs.from_cli_args(parser.parse_args(["--model", folder, *flags]))
    for name, value in engine_args(max_num_seqs=32, **options).items():
        assert getattr(parsed, name) == value, name


@given(st.integers(1, 300), st.integers(2, 140_000), st.data())
def test_a_step_of_any_batch_has_a_room(num_seqs, max_model_len, data):
    graphs = object.__new__(SpectralCudaGraphs)
    graphs._max_blocks = -(-max_model_len // 512)
    rooms = graphs.rooms(num_seqs)
    reads = data.draw(st.integers(0, num_seqs * graphs._max_blocks))
    assert rooms == sorted(set(rooms)) and rooms[0] == 0
    assert any(room >= reads for room in rooms) and rooms[-1] <= num_seqs * graphs._max_blocks
