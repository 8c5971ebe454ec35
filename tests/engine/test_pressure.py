"""Under pressure a request is refused at once or served, and every preemption is reported."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.engine import check_request
from spectral_paged.errors import CapacityError
from spectral_paged.scheduler import PreemptionReason, Request, Scheduler, SchedulerConfig
from spectral_paged.scheduler.scheduler import STEPS_UNTIL_RAISED
from support.cache_feed import LAYERS, D, H, fmt, make
from support.counting_cache import CountingCache, request
from support.tiny_model import random_prompts, tiny_format, tiny_llm

FORMATS = {
    "int8": fmt(),
    "segment-1024": fmt(segment=1024),
    "exact": fmt("exact"),
    "no-hot": fmt(hot_tokens=0),
    "no-landmarks": fmt(num_landmark_tokens=0),
}


def zeros(count):
    return torch.zeros(2, count, H, D)


class Storing:
    """A scheduler over a real cache whose model says nothing: K and V are zeros."""

    def __init__(self, cache, *, caching=True, **budgets):
        self.cache, self.caching = cache, caching
        self.scheduler = Scheduler(cache, SchedulerConfig(**budgets))
        self.goal: dict[str, int] = {}
        self.finished: list[str] = []
        self.num_steps = 0

    def add(self, name, prompt, generated):
        """Queue a request, or say that it is refused."""
        params = SamplingParams(max_tokens=generated)
        ids = [hash((name if self.caching else 0, i)) % 50 for i in range(prompt)]
        try:
            check_request(self.cache, ids, params, (), None)
        except CapacityError as error:
            text = str(error)
            assert f"{prompt} prompt tokens" in text
            assert f"at most {self.cache.max_sequence_tokens} tokens" in text
            return False
        self.goal[name] = min(prompt + generated, self.cache.max_model_len)
        self.scheduler.add(Request(name, ids, prompt, self.goal[name]))
        return True

    def step(self):
        """One step; who finished in it."""
        out = self.scheduler.schedule()
        self.num_steps += 1
        assert out.new_tokens or out.preempted, "a step did nothing"
        ended = []
        if out.new_tokens:
            plan = self.cache.plan(out.new_tokens)
            self.cache.begin_step(plan)
            for layer in range(LAYERS):
                self.cache.append(layer, *zeros(plan.num_tokens))
            self.cache.end_step()
        for r in [r for r in self.scheduler.running if r.request_id in out.new_tokens]:
            if self.cache.num_tokens(r.request_id) == r.num_tokens:
                r.token_ids.append(1)
                if r.num_tokens >= self.goal[r.request_id]:
                    self.scheduler.finish(r)
                    ended.append(r.request_id)
        self.finished += ended
        return ended


def steps_to_finish(lengths, budget, chunk=64):
    """Steps in which the oldest of these requests must finish: it is computed from nothing at
    most once for each that is older, and every step gives it a token or another its last."""
    prompt, generated = (max(x[i] for x in lengths) for i in (0, 1))
    return len(lengths) * (-(-prompt // min(budget, chunk)) + generated + 2)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(FORMATS)),
    extra=st.integers(0, 5),
    lengths=st.lists(st.tuples(st.integers(1, 1300), st.integers(1, 90)), min_size=2, max_size=7),
    budget=st.sampled_from([64, 300, 4096]),
    seats=st.integers(1, 6),
    caching=st.booleans(),
    exempt=st.booleans(),
)
def test_under_any_pressure_some_request_finishes_in_a_bounded_number_of_steps(
    name, extra, lengths, budget, seats, caching, exempt
):
    format = FORMATS[name]
    cache = make(
        format,
        kv_cache_bytes=(1_000_000 if exempt or name == "exact" else 560_000) + 90_000 * extra,
        max_num_seqs=seats,
        max_model_len=1500,
        enable_prefix_caching=caching,
        exempt_layers=[0] if exempt and format.seals else [],
    )
    run = Storing(cache, caching=caching, max_num_seqs=seats, max_num_batched_tokens=budget)
    accepted = [str(i) for i, x in enumerate(lengths) if run.add(str(i), *x)]
    bound, since = steps_to_finish(lengths, budget), 0
    while run.scheduler.has_unfinished:
        since = 0 if run.step() else since + 1
        assert since <= bound, f"nobody finished in {bound} steps"
        cache.check_integrity()
    assert sorted(run.finished) == sorted(accepted)
    assert cache.stats()["num_sequences"] == 0


@pytest.mark.parametrize(
    "name, exempt",
    [(n, e) for e in (False, True) for n in FORMATS if not e or n != "exact"],  # all is exact there
)
def test_what_is_admitted_fits_alone_and_one_token_more_is_refused(name, exempt):
    """At every size of the pool: the longest sequence runs to its end without a preemption."""
    format, exempt_layers = FORMATS[name], [0] if exempt else []
    smallest = 300_000 if not exempt_layers else 700_000
    for budget in range(smallest, smallest + 400_000, 33_000):
        cache = make(format, kv_cache_bytes=budget, exempt_layers=exempt_layers)
        longest = cache.max_sequence_tokens
        for prompt in {1, longest // 2, longest - 70, longest - 1} - {0, -1}:
            if prompt < 1 or (prompt == 1 and budget > smallest + 200_000):
                continue
            run = Storing(cache, caching=False)
            assert run.add("a", prompt, longest - prompt)
            while run.scheduler.has_unfinished:
                run.step()
            assert run.scheduler.num_preemptions == 0
            cache.check_integrity()
            assert not run.add("b", prompt, longest - prompt + 1)


# ---- fair progress -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    long=st.integers(100, 400),
    short=st.integers(1, 40),
    generated=st.integers(1, 12),
    budget=st.sampled_from([16, 64, 200]),
    every=st.integers(1, 6),
    seqs=st.integers(2, 6),
    slots=st.integers(56, 90),
)
def test_short_requests_finish_under_a_stream_of_long_prompts(
    long, short, generated, budget, every, seqs, slots
):
    """A short request waits for what came before it and for nothing that comes later: its steps
    are bounded by the requests that were ahead of it, however many long prompts follow."""
    cache = CountingCache(slots)
    s = Scheduler(cache, SchedulerConfig(seqs, budget))
    goal, arrived, waited, number = {}, {}, {}, 0

    def add(name, length):
        goal[name] = length + generated
        ahead = [goal[r.request_id] for r in (*s.waiting, *s.running)] + [goal[name]]
        # The oldest is never preempted and has what others' single tokens leave of each step, so
        # from nothing it needs so many; then the next is the oldest.
        steps = sum(-(-tokens // (budget - seqs + 1)) + generated + 2 for tokens in ahead)
        arrived[name] = (step, steps)
        s.add(request(name, length))

    for step in range(500):
        if step % every == 0 and step < 300:
            add(f"long-{number}", long)
            number += 1
        if step % 40 == 7:
            add(f"short-{step}", short)
        if not s.has_unfinished:
            continue
        out = s.schedule()
        cache.step(out)
        for r in list(s.running):
            done = cache.stored[r.request_id] == r.num_tokens and r.request_id in out.new_tokens
            if done:
                r.token_ids.append(0)
                if r.num_tokens > goal[r.request_id]:
                    s.finish(r)
                    waited[r.request_id] = step - arrived[r.request_id][0]
    judged = {n: bound for n, (start, bound) in arrived.items() if start + bound < 500}
    assert any(n.startswith("short") for n in judged)
    assert all(waited.get(n, bound + 1) <= bound for n, bound in judged.items())


def test_a_running_request_gets_a_token_every_step_while_long_prompts_come_in():
    cache = CountingCache(10_000)
    s = Scheduler(cache, SchedulerConfig(8, 64))
    chat = request("chat", 5)
    s.add(chat)
    cache.step(s.schedule())
    for i in range(100):
        chat.token_ids.append(0)
        s.add(request(f"long-{i}", 500))
        out = s.schedule()
        assert out.new_tokens["chat"] == 1 and out.num_tokens == 64
        cache.step(out)
        for r in list(s.running):
            if r is not chat and cache.stored[r.request_id] == 500:
                s.finish(r)


# ---- what is told ------------------------------------------------------------------------


def test_preemptions_are_logged_and_counted_with_their_reasons(caplog):
    prompts = random_prompts([30, 300, 60, 65, 70, 40, 62, 90, 56, 61], seed=5)
    llm = tiny_llm(tiny_format(), kv_cache_bytes=700_000, enable_prefix_caching=False)
    with caplog.at_level(logging.WARNING, "spectral_paged.scheduler.scheduler"):
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0.0, max_tokens=90), use_tqdm=False
        )
    stats = llm.stats()
    told = Counter()
    for record in caplog.records:
        text = record.getMessage()
        reason = next(r for r in PreemptionReason if r.value in text)
        told[reason.value] += 1
        assert text.startswith("preempted request-") and "tokens are dropped" in text
        assert "kv_cache_bytes" in text
    assert told.total() == stats["preemptions"] > 0
    assert told[PreemptionReason.OLDER.value] == stats["preemptions_older"] > 0
    assert told[PreemptionReason.OWN_TOKENS.value] == stats["preemptions_own_tokens"] > 0
    assert sum((Counter(o.metrics.preemption_reasons) for o in outputs), Counter()) == told
    assert all(len(o.metrics.preemption_reasons) == o.metrics.num_preemptions for o in outputs)
    # without a prefix cache everything that was dropped is computed again
    dropped = sum(
        int(r.getMessage().split(" tokens are dropped")[0].split()[-1]) for r in caplog.records
    )
    assert stats["recomputed_tokens"] == dropped > 0
    assert sum(o.metrics.num_recomputed_tokens for o in outputs) == dropped


def test_a_lowered_token_budget_comes_back_by_and_by():
    cache = CountingCache(100_000)
    s = Scheduler(cache, SchedulerConfig(4, 1000))
    s.add(request("a", 50_000))
    s.lower_budget(0)
    seen = []
    while not seen or seen[-1] < 1000:
        out = s.schedule()
        cache.step(out)
        seen.append(out.num_tokens)
    assert seen[:STEPS_UNTIL_RAISED] == [1] * STEPS_UNTIL_RAISED
    assert sorted(seen) == seen and len(seen) <= 11 * (STEPS_UNTIL_RAISED + 1)
    assert s.token_budget == 1000
