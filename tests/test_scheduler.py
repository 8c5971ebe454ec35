"""Scheduler over a cache made of counters: order, budgets, preemption, progress."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
from counting_cache import CountingCache, request
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_paged.scheduler as scheduler_package
from spectral_paged.scheduler import (
    PreemptionReason,
    RequestStatus,
    Scheduler,
    SchedulerConfig,
)


def scheduler(cache, requests, **budgets):
    s = Scheduler(cache, SchedulerConfig(**budgets))
    for r in requests:
        s.add(r)
    return s


def test_the_scheduler_imports_no_torch():
    # the package's own __init__ imports torch, so the scheduler is loaded as a bare package
    code = (
        "import sys, types, pathlib\n"
        f"folder = pathlib.Path({str(pathlib.Path(scheduler_package.__file__).parent)!r})\n"
        "root = types.ModuleType('spectral_paged'); root.__path__ = []\n"
        "pkg = types.ModuleType('spectral_paged.scheduler'); pkg.__path__ = [str(folder)]\n"
        "sys.modules['spectral_paged'] = root; sys.modules['spectral_paged.scheduler'] = pkg\n"
        "import spectral_paged.scheduler.scheduler\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_first_come_is_first_served():
    cache = CountingCache(4)
    s = scheduler(cache, [request("a", 16), request("b", 24), request("c", 1)])
    assert list(s.schedule().new_tokens) == ["a"], "b does not fit, and c does not overtake it"


def test_a_step_never_exceeds_its_budgets():
    cache = CountingCache(100)
    s = scheduler(
        cache,
        [request(str(i), 50) for i in range(6)],
        max_num_seqs=3,
        max_num_batched_tokens=64,
    )
    out = s.schedule()
    assert out.new_tokens == {"0": 50, "1": 14}
    cache.step(out)
    s.running[0].token_ids.append(0)
    out = s.schedule()
    assert out.new_tokens == {"0": 1, "1": 36, "2": 27} and len(s.running) == 3


def test_decodes_come_before_a_long_prompt():
    cache = CountingCache(1000)
    old, new = request("old", 500), request("new", 4)
    s = scheduler(cache, [old], max_num_batched_tokens=32)
    cache.step(s.schedule())
    s.add(new)
    new.status = RequestStatus.RUNNING
    s.waiting.clear()
    cache.add_sequence("new", num_prompt_tokens=4)
    cache.stored["new"] = 3
    s.running.append(new)
    assert list(s.schedule().new_tokens.items())[0] == ("new", 1)


def test_the_newest_gives_way_and_is_recomputed_first():
    cache = CountingCache(6)
    a, b, c = request("a", 15), request("b", 16), request("c", 16)
    s = scheduler(cache, [a, b, c])
    cache.step(s.schedule())
    d = request("d", 1)
    s.add(d)
    for r in (a, b, c):
        r.token_ids.append(0)
    out = s.schedule()  # a fills its page; b needs a slot: c goes
    assert out.preempted == ["c"] and out.new_tokens == {"a": 1, "b": 1}
    assert [r.request_id for r in s.waiting] == ["c", "d"]
    assert c.preemptions == [PreemptionReason.OLDER] and s.num_preemptions == 1
    assert c.num_recomputed_tokens == s.num_recomputed_tokens == 0, "nothing is computed again yet"
    cache.step(out)
    s.finish(a)
    assert s.schedule().new_tokens == {"c": 17}
    assert c.num_recomputed_tokens == s.num_recomputed_tokens == 16


def test_a_request_that_cannot_go_on_preempts_itself_at_last():
    cache = CountingCache(4)
    a, b = request("a", 16), request("b", 16)
    s = scheduler(cache, [a, b])
    cache.step(s.schedule())
    b.token_ids.append(0)
    out = s.schedule()
    assert out.preempted == ["b"] and not out.new_tokens
    assert s.preemptions == {PreemptionReason.OWN_TOKENS: 1}
    a.token_ids.append(0)
    assert s.schedule().new_tokens == {"a": 1}


def test_seals_have_a_budget_and_still_make_progress():
    cache = CountingCache(1000, seal_every=10)
    s = scheduler(cache, [request(str(i), 30) for i in range(4)], max_seals_per_step=4)
    out = s.schedule()  # three seals each: one request, then the budget is short
    assert list(out.new_tokens) == ["0"]
    s = scheduler(CountingCache(1000, seal_every=1), [request("x", 30)], max_seals_per_step=1)
    assert s.schedule().new_tokens == {"x": 30}


def test_no_seat_in_the_cache_means_not_now():
    cache = CountingCache(100, seats=1)
    s = scheduler(cache, [request("a", 4), request("b", 4)])
    assert list(s.schedule().new_tokens) == ["a"]


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_seals_per_step"])
def test_a_budget_below_one_is_refused(name):
    with pytest.raises(ValueError, match=name):
        SchedulerConfig(**{name: 0})


def test_finish_frees_running_and_forgets_waiting():
    cache = CountingCache(100)
    a, b = request("a", 4), request("b", 4)
    s = scheduler(cache, [a, b], max_num_seqs=1)
    cache.step(s.schedule())
    s.finish(b)
    s.finish(a)
    s.finish(a)
    assert not cache.stored and not s.has_unfinished


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=10),
    num_slots=st.integers(12, 24),
    chunk=st.integers(1, 40),
    tokens=st.integers(1, 80),
    seqs=st.integers(1, 6),
)
def test_every_request_finishes_whatever_the_budgets(lengths, num_slots, chunk, tokens, seqs):
    cache = CountingCache(num_slots, chunk=chunk, seal_every=7)
    requests = [request(str(i), n) for i, (n, _) in enumerate(lengths)]
    s = scheduler(
        cache, requests, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_seals_per_step=2
    )
    goal = {str(i): n + g for i, (n, g) in enumerate(lengths)}
    by_id = {r.request_id: r for r in requests}
    first_started = []
    for _ in range(20_000):
        if not s.has_unfinished:
            break
        out = s.schedule()
        assert out.new_tokens or out.preempted, "a step did nothing"
        assert out.num_tokens <= tokens and len(s.running) <= seqs
        assert not set(out.new_tokens) & set(out.preempted)
        cache.step(out)
        for name in out.new_tokens:
            if name not in first_started:
                first_started.append(name)
            r = by_id[name]
            if cache.stored[name] == r.num_tokens:
                r.token_ids.append(0)
                if r.num_tokens > goal[name]:
                    s.finish(r)
    assert not s.has_unfinished and not cache.stored
    order = [int(n) for n in first_started]
    assert order == sorted(order), "a later request overtook an earlier one"
