"""The scheduler over a cache made of counters: order, budgets, preemption, progress."""

from __future__ import annotations

import copy
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st

import spectral_paged.scheduler as scheduler_package
from spectral_paged.scheduler import (
    PreemptionReason,
    Request,
    RequestStatus,
    SchedulerConfig,
)
from support.counting_cache import CountingCache, request, scheduler


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


def test_what_a_resume_finds_cached_is_not_counted_as_recomputed(monkeypatch):
    cache = CountingCache(4)
    a, b = request("a", 16), request("b", 16)
    s = scheduler(cache, [a, b])
    cache.step(s.schedule())
    b.token_ids.append(0)
    assert s.schedule().preempted == ["b"] and s.num_recomputed_tokens == 0
    s.finish(a)
    add = cache.add_sequence

    def add_with_a_hit(seq_id, **options):
        add(seq_id, **options)
        cache.stored[seq_id] = 8
        return 8

    monkeypatch.setattr(cache, "add_sequence", add_with_a_hit)
    assert s.schedule().new_tokens == {"b": 9}
    assert b.num_recomputed_tokens == s.num_recomputed_tokens == 8


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


def test_requests_that_may_not_start_are_passed_and_keep_their_order():
    """They take no seat, no other waits for them, and nothing is forgotten because of them."""
    ready, cache = set(), CountingCache(100)
    requests = [request(name, 8) for name in "abcde"]
    for held in "abd":
        requests["abcde".index(held)].may_start = lambda held=held: held in ready
    s = scheduler(cache, requests, max_num_seqs=2)
    out = s.schedule()
    assert list(out.new_tokens) == ["c", "e"] and out.num_delayed == out.num_passed == 3
    assert [r.request_id for r in s.waiting] == ["a", "b", "d"]
    for name in "ce":
        s.finish(next(r for r in s.running if r.request_id == name))
    out = s.schedule()
    assert not out.new_tokens and out.num_passed == 3 and cache.num_resets == 0
    ready |= {"b", "d"}
    out = s.schedule()
    assert list(out.new_tokens) == ["b", "d"]
    cache.step(out)
    assert [r.request_id for r in s.waiting] == ["a"]
    ready.add("a")
    s.finish(next(r for r in s.running if r.request_id == "d"))
    assert list(s.schedule().new_tokens)[-1] == "a"


def test_the_cache_is_told_all_that_separates_requests():
    cache = CountingCache(100)
    cache.cached = 8
    asked = Request("a", [5, 6, 7] * 4, 9, cache_salt="x", pinned_spans=((1, 3),))
    s = scheduler(cache, [asked])
    assert s.schedule().new_tokens == {"a": 4} and asked.num_cached_tokens == 8
    assert cache.asked["a"] == (9, asked.token_ids, "x", ((1, 3),))
    assert cache.asked["a"][1] is asked.token_ids, "the cache follows what is generated"


def test_a_resume_is_no_prefix_hit_of_the_request():
    cache = CountingCache(100)
    cache.cached = 8
    a = request("a", 9)
    a.preemptions, a.num_cached_tokens = [PreemptionReason.OLDER], 3
    scheduler(cache, [a]).schedule()
    assert a.num_cached_tokens == 3


def test_a_chunk_is_never_longer_than_the_cache_lets_it_be():
    s = scheduler(CountingCache(100, chunk=5), [request("a", 12)])
    assert s.schedule().new_tokens == {"a": 5}


@pytest.mark.parametrize("seats, seated", [(2, True), (1, False)])
def test_a_fork_runs_where_there_is_a_seat(seats, seated):
    cache = CountingCache(100)
    parent, child = request("a", 4), request("b", 4)
    s = scheduler(cache, [parent], max_num_seqs=seats)
    cache.step(s.schedule())
    cache.add_sequence("b", num_prompt_tokens=4)
    assert s.has_seat is seated
    if s.has_seat:
        s.adopt(child)
    assert s.running == [parent, child][: 1 + seated] and not s.waiting
    assert child.status is (RequestStatus.RUNNING if seated else RequestStatus.WAITING)


def test_what_is_queued_again_waits_and_comes_first():
    s = scheduler(CountingCache(100), [request("a", 4)])
    again = request("b", 4)
    again.status = RequestStatus.RUNNING
    s.requeue(again)
    assert again.status is RequestStatus.WAITING
    assert list(s.schedule().new_tokens) == ["b", "a"]


def test_finish_takes_a_request_that_was_never_queued():
    """A sibling that has not started is neither running nor in the queue."""
    s = scheduler(CountingCache(100), [])
    sibling = request("a", 4)
    s.finish(sibling)
    assert sibling.status is RequestStatus.FINISHED and not s.has_unfinished


def test_cached_slots_make_room_for_the_only_request_that_is_left():
    """And only for it: while others run, what is cached stays."""

    class Crowded(CountingCache):
        def _used(self):
            return super()._used() + (0 if self.num_resets else 3)

    cache = Crowded(4)
    s = scheduler(cache, [request("a", 20)])
    assert s.schedule().new_tokens == {"a": 20} and cache.num_resets == 1
    cache = CountingCache(4)
    s = scheduler(cache, [request("a", 20), request("b", 20)])
    cache.step(s.schedule())
    assert not s.schedule().new_tokens and cache.num_resets == 0, "b waits until a has ended"
    assert not scheduler(cache, []).schedule().new_tokens and cache.num_resets == 0


def test_preemptions_are_counted_one_by_one():
    cache = CountingCache(4)
    a, b = request("a", 16), request("b", 16)
    s = scheduler(cache, [a, b])
    cache.step(s.schedule())
    a.token_ids.append(0)
    cache.step(s.schedule())
    assert b.num_preemptions == 1 and b.num_recomputed_tokens == 0
    s.finish(a)
    cache.step(s.schedule())
    assert b.num_recomputed_tokens == 16
    s.add(request("c", 16))
    cache.step(s.schedule())
    b.token_ids.append(0)
    assert s.schedule().preempted == ["c"]
    s.running.clear()
    s.running.append(b)
    cache.cancel_reservation("b")
    cache.num_slots = 2
    assert s.schedule().preempted == ["b"]
    assert b.num_preemptions == 2 and s.num_preemptions == 3
    assert b.preemptions == [PreemptionReason.OLDER, PreemptionReason.OWN_TOKENS]


def test_the_budget_of_one_that_gives_way_goes_to_others(caplog):
    """The newest has its token of this step already when an older one needs its slots."""
    cache = CountingCache(6, seal_every=9)
    old, mid, new = request("old", 8), request("mid", 8), request("new", 8)
    s = scheduler(cache, [old, mid, new], max_num_batched_tokens=24, max_seals_per_step=3)
    cache.step(s.schedule())
    new.token_ids.append(0)
    old.token_ids.extend([0] * 17)
    mid.token_ids.extend([0] * 7)
    out = s.schedule()
    assert out.preempted == ["new"] and out.new_tokens == {"old": 17, "mid": 7}
    assert (
        "preempted new: an older request needs its slots; the pool is full, and old has 17 tokens "
        "to store. 8 tokens are dropped, and recomputed unless the prefix cache keeps them "
        "(2 running, 1 waiting, 1 preemptions so far). More kv_cache_bytes or a smaller "
        "max_num_seqs avoids this"
    ) in caplog.messages
    told = vars(caplog.records[-1])
    want = {
        "event": "preemption",
        "request_id": "new",
        "reason": "an older request needs its slots",
        "num_dropped_tokens": 8,
        "num_running": 2,
        "num_waiting": 1,
        "num_preemptions": 1,
    }
    assert {name: told[name] for name in want} == want
    assert s.stats() == {
        "running": 2,
        "waiting": 1,
        "preemptions": 1,
        "preemptions_older": 1,
        "preemptions_own_tokens": 0,
        "recomputed_tokens": 0,
        "token_budget": 24,
    }
    assert cache.resumed == {"old": False, "mid": False, "new": False}


def test_what_is_computed_again_adds_up_over_resumes():
    cache = CountingCache(4)
    a, b = request("a", 16), request("b", 16)
    s = scheduler(cache, [a, b])
    cache.step(s.schedule())
    for times in (1, 2):
        a.token_ids.append(0)
        assert s.schedule().preempted == ["b"]
        s.finish(a)
        assert s.schedule().new_tokens == {"b": 16} and cache.resumed["b"]
        assert b.num_recomputed_tokens == s.num_recomputed_tokens == 16 * times
        assert b.num_dropped_tokens == 0
        cache.stored["b"], cache.reserved["b"] = 16, 0
        a = request(f"a{times}", 16)  # older than b, as far as the scheduler goes
        s.add(a)
        cache.step(s.schedule())
        s.running.reverse()


@pytest.mark.parametrize("forget", [False, True])
def test_what_a_request_stored_is_forgotten_where_that_is_asked_for(forget):
    cache = CountingCache(100)
    a = request("a", 9)
    s = scheduler(cache, [a])
    s.schedule()
    s.finish(a, forget=forget)
    assert cache.forgotten == {"a": forget}


def test_a_request_that_cannot_be_looked_at_waits_on_and_holds_nothing(monkeypatch):
    cache = CountingCache(100)
    s = scheduler(cache, [request("a", 9)])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(cache, "chunk_limit", lambda seq_id: 1 // 0)
        s.schedule()
    assert not cache.stored and [r.request_id for r in s.waiting] == ["a"]
    assert s.schedule().new_tokens == {"a": 9}


def test_a_lowered_budget_doubles_after_so_many_steps_up_to_what_it_was():
    cache = CountingCache(1000)
    s = scheduler(cache, [request("a", 900)], max_num_batched_tokens=11)
    found = []
    for step in range(70):
        if step == 5:
            s.lower_budget(3)
        out = s.schedule()
        found.append(out.num_tokens)
        cache.step(out)
    assert found == [11] * 5 + [3] * 16 + [6] * 17 + [11] * 32
    s.lower_budget(0)
    assert s.schedule().num_tokens == 1


@pytest.mark.parametrize("by", ["a", "itself"])
def test_others_go_on_when_one_gives_way(by):
    """In this order: a and c, with a token to go each, then b; c goes for want of a slot."""
    cache = CountingCache(3)
    a, b, c = request("a", 8), request("b", 4), request("c", 8)
    s = scheduler(cache, [a, b, c])
    cache.step(s.schedule())
    (a if by == "a" else c).token_ids.append(0)
    b.token_ids.extend([0] * 3)
    c.token_ids.extend([0] * (by == "a"))
    out = s.schedule()
    assert out.preempted == ["c"] and out.new_tokens == ({"a": 1} if by == "a" else {}) | {"b": 3}


def test_a_request_with_two_tokens_to_go_does_not_overtake_one_with_one():
    cache = CountingCache(100)
    a, b = request("a", 4), request("b", 4)
    s = scheduler(cache, [a, b])
    cache.step(s.schedule())
    a.token_ids.extend([0, 0])
    b.token_ids.append(0)
    assert list(s.schedule().new_tokens) == ["b", "a"]


@pytest.mark.parametrize(
    "lengths, seals, started",
    [
        ((30, 5), 1, "ab"),  # seals nothing: a budget that is overdrawn does not matter
        ((5, 30), 1, "ab"),  # the first that seals passes, whoever came before
        ((10, 20), 1, "a"),  # the second that seals does not
        ((10, 20), 2, "a"),
        ((10, 20), 3, "ab"),  # to the last seal
    ],
)
def test_who_seals_within_the_budget(lengths, seals, started):
    cache = CountingCache(100, seal_every=10)
    requests = [request(name, n) for name, n in zip("ab", lengths)]
    s = scheduler(cache, requests, max_seals_per_step=seals)
    assert "".join(s.schedule().new_tokens) == started


def test_one_whose_token_is_on_its_way_is_not_resumed_yet():
    cache = CountingCache(100)
    a = request("a", 4)
    s = scheduler(cache, [a, request("b", 4)])
    a.num_pending = 1
    assert not s.schedule().new_tokens and cache.num_resets == 1
    a.num_pending = 0
    assert list(s.schedule().new_tokens) == ["a", "b"]


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


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=6),
    num_slots=st.integers(12, 24),
    chunk=st.integers(1, 40),
    tokens=st.integers(1, 60),
    seqs=st.integers(1, 6),
    rows=st.integers(0, 20),
    random=st.randoms(use_true_random=False),
)
def test_drafts_take_only_what_a_step_has_left(
    lengths, num_slots, chunk, tokens, seqs, rows, random
):
    cache = CountingCache(num_slots, chunk=chunk, seal_every=7)
    requests = [request(str(i), n) for i, (n, _) in enumerate(lengths)]
    budgets = {"max_num_batched_tokens": tokens, "max_seals_per_step": 2, "max_decode_rows": rows}
    s = scheduler(cache, requests, max_num_seqs=seqs, **budgets)
    goal = {str(i): n + g for i, (n, g) in enumerate(lengths)}
    while s.has_unfinished:
        drafts = {
            r.request_id: [1] * random.randint(1, 9)
            for r in s.running
            if cache.stored[r.request_id] == r.num_tokens - 1 and random.random() < 0.8
        }
        plain = copy.deepcopy(s).schedule()
        out = s.schedule(drafts)
        assert out.preempted == plain.preempted, "somebody gave way to a draft"
        assert list(out.new_tokens) == list(plain.new_tokens)
        lengths_of = {name: len(draft) for name, draft in out.drafts.items()}
        for name, count in out.new_tokens.items():
            assert count - lengths_of.get(name, 0) == plain.new_tokens[name]
            assert count <= max(chunk, 1)
        assert out.num_tokens <= tokens
        assert all(0 < n <= len(drafts[name]) for name, n in lengths_of.items())
        singles = [n for name, n in plain.new_tokens.items() if n == 1]
        assert not lengths_of or len(singles) + sum(lengths_of.values()) <= max(rows, seqs)
        cache.step(out)
        for name in out.new_tokens:
            r = requests[int(name)]
            rejected = random.randint(0, lengths_of.get(name, 0))
            cache.stored[name] -= rejected
            if name in out.drafts or cache.stored[name] == r.num_tokens:
                r.token_ids += [0] * (1 + lengths_of.get(name, 0) - rejected)
                if r.num_tokens > goal[name]:
                    s.finish(r)
    assert not cache.stored
