"""The whole engine as a state machine over a model that notices every wrong byte it reads.

Any order of requests, steps, aborts, resets, forks and preemptions gives the tokens of the scripts
of `digit_model`. K and V read back are those that were stored, and the pool is whole after every
operation. Freed memory is poisoned throughout.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spectral_paged import SamplingParams
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.sequences import SequenceTable
from spectral_paged.engine.sampled_step import SampledStep
from support.checked_engine import CheckedEngine
from support.digit_model import EOS, VOCAB, formats
from support.effort import examples

# format, bytes of the smallest pool, steps queued ahead, layers that stay exact
MACHINES = {
    "post-ahead": ("post", 330_000, True, ()),
    "frame-lockstep": ("frame", 330_000, False, ()),
    "frame-exempt-ahead": ("frame", 640_000, True, (1,)),
    "bare-ahead": ("bare", 330_000, True, ()),
    "exact-ahead": ("exact", 340_000, True, ()),
    "exact-lockstep": ("exact", 340_000, False, ()),
}
# the same with drafts, of which some are accepted
DRAFTING = {
    "bare-ahead-drafts": ("bare", 330_000, True, ()),
    "frame-lockstep-drafts": ("frame", 330_000, False, ()),
}
MIN_STEPS = 12_000  # of all machines together
ALWAYS = {"finished", "aborted", "forks", "preemptions", "prefix_hit_tokens", "slots_evicted"}
WITH_PAGES = ALWAYS | {"pages_sealed", "pages_attended", "pinned"}


class EngineMachine(RuleBasedStateMachine):
    machine_name = "post-ahead"
    total: Counter

    @initialize(
        extra=st.sampled_from([0, 40_000, 200_000]),
        seats=st.sampled_from([5, 3, 2]),
        budget=st.sampled_from([700, 64, 2000]),
        seals=st.sampled_from([64, 1]),
    )
    def start(self, extra, seats, budget, seals):
        name, num_bytes, ahead, exempt_layers = (MACHINES | DRAFTING)[self.machine_name]
        self.engine = CheckedEngine(
            formats()[name],
            num_bytes=num_bytes + extra,
            seats=seats,
            budget=budget,
            seals=seals,
            ahead=ahead,
            exempt_layers=exempt_layers,
            drafts=self.machine_name in DRAFTING,
        )
        self.num_submitted = 0
        self.ended: list[str] = []

    def _submit(self, name, family, shared, own, params, salt, pins):
        base = torch.Generator().manual_seed(family)
        rest = torch.Generator().manual_seed(100 + self.num_submitted)
        prompt = torch.randint(VOCAB, (shared,), generator=base).tolist()
        prompt += torch.randint(VOCAB, (own,), generator=rest).tolist()
        self.engine.submit(name, prompt, params, salt, pins)
        self.num_submitted += 1

    @rule(
        family=st.integers(0, 1),
        shared=st.sampled_from([640, 1217, 700, 64, 0]),
        own=st.sampled_from([1, 64, 575, 63, 300]),
        most=st.sampled_from([60, 1, 150, 7, 700]),
        n=st.sampled_from([1, 1, 3]),
        heat=st.sampled_from([0.0, 1.0]),
        salt=st.sampled_from(["", "", "b"]),
        pins=st.sampled_from([(), (), ((0, 10), (580, 1100)), ((640, 641),)]),
    )
    def submit(self, family, shared, own, most, n, heat, salt, pins):
        params = SamplingParams(n=n, temperature=heat, max_tokens=most)
        self._submit(f"r{self.num_submitted}", family, shared, own, params, salt, pins)

    @rule(
        own=st.sampled_from([30, 577]),
        seed=st.integers(0, 2),
        ignore=st.booleans(),
        least=st.sampled_from([0, 20]),
        penalty=st.sampled_from([0.0, 0.0, 1e-3]),
    )
    def submit_with_stops(self, own, seed, ignore, least, penalty):
        """Endings of every kind; the penalty changes no token, but counts them."""
        params = SamplingParams(
            temperature=1.0 if not penalty else 0.0,
            seed=seed,
            ignore_eos=ignore,
            max_tokens=80,
            min_tokens=least,
            stop_token_ids=[3, 5, 8],
            presence_penalty=penalty,
        )
        self._submit(f"r{self.num_submitted}", 2, 0, own, params, "", ())

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def submit_again(self, data):
        """The name of a request that was aborted is free at once."""
        name = self.ended.pop(data.draw(st.integers(0, len(self.ended) - 1)))
        self._submit(name, 0, 640, 10, SamplingParams(temperature=0.0, max_tokens=30), "", ())

    @precondition(lambda self: self.engine.running)
    @rule(count=st.sampled_from([60, 1, 3, 200]))
    def steps(self, count):
        for _ in range(count):
            if not self.engine.running:
                return
            self.engine.step()

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.engine.running)))
        self.engine.abort(name)
        self.ended.append(name)

    @rule()
    def reset_prefix_cache(self):
        self.engine.reset_prefix_cache()

    @precondition(lambda self: self.engine.running)
    @rule()
    def drain(self):
        self.engine.drain()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()
            self.total.update(self.engine.figures())


def explored(name, max_examples):
    """The figures of a machine's random runs, all together."""
    total = Counter()
    machine = type("Machine", (EngineMachine,), {"machine_name": name, "total": total})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return total


@pytest.mark.parametrize("name", MACHINES)
def test_any_order_of_requests_gives_the_written_tokens(name):
    total = explored(name, examples(12, 100))
    wanted = ALWAYS if MACHINES[name][0] == "exact" else WITH_PAGES
    assert not wanted - set(+total), f"something was never exercised: {total}"
    assert total["steps"] >= MIN_STEPS / len(MACHINES), total


@pytest.mark.parametrize("name", DRAFTING)
def test_no_draft_is_seen_by_anybody(name):
    """Not in pages, in prefixes, in forks, nor by the request that it was for."""
    total = explored(name, examples(8, 100))
    drafted, accepted = (total[f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert 200 < accepted < 0.9 * drafted, total
    assert not WITH_PAGES - set(+total), f"something was never exercised: {total}"


# ---- the machine would notice ------------------------------------------------------------


def served(**changes):
    """Requests with a common beginning, and one whose end another began otherwise; one after the
    other, and how often what happened."""
    engine = CheckedEngine(formats()["frame"], num_bytes=1_000_000, **changes)
    shared, begin, other = (torch.randint(VOCAB - 1, (n,)).tolist() for n in (640, 128, 128))
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    for i, salt in enumerate(("", "other", "")):
        engine.submit(f"r{i}", [i, *shared, i], params, salt)
        engine.submit(f"s{i}", [*shared, i], params, salt)
        engine.drain()
    for name, ids in (("xy", begin + shared), ("z", other), ("zy", other + shared)):
        engine.submit(name, ids, params, "chains")
        engine.drain()
    return engine


def test_nothing_is_noticed_where_nothing_is_wrong():
    assert served().figures()["prefix_hit_tokens"] == 640 + 128


def spoil_a_link(monkeypatch):
    """A span's digest leaves out what came before it, and nothing else."""
    extend = PrefixChain.extend

    def unchained(self, token_ids, num_tokens):
        digests, self._digests = self._digests, []
        for i in range(len(digests), num_tokens // 64):
            alone = PrefixChain(
                self._root.decode(),
                self._num_prompt_tokens - 64 * i,
                generated_differ=self._generated_differ,
            )
            extend(alone, token_ids[64 * i : 64 * (i + 1)], 64)
            digests.append(alone[0])
        self._digests = digests

    monkeypatch.setattr(PrefixChain, "extend", unchained)


def spoil_the_salt(monkeypatch):
    chain = SequenceTable._chain
    monkeypatch.setattr(SequenceTable, "_chain", lambda self, state, salt: chain(self, state, ""))


def spoil_a_page(monkeypatch):
    """A page is written to another slot than the one that is shown."""
    from spectral_paged.cache import encoder

    monkeypatch.setattr(encoder, "put_units", lambda planes, units, pages: None)


def spoil_a_token(monkeypatch):
    """A single token's K is stored wrong."""
    from spectral_paged.cache.attention import PagedAttention

    append = PagedAttention._append

    def changing(self, group, step, layer, k, v):
        if layer == 1 and len(k) > 7:
            k[7, 0, 2] += 1
        return append(self, group, step, layer, k, v)

    monkeypatch.setattr(PagedAttention, "_append", changing)


def test_a_draft_that_is_kept_is_noticed(monkeypatch):
    monkeypatch.setattr(SampledStep, "kept", lambda self, results: list(range(len(results))))
    assert {"stale", "wrong"} <= set(served(strict=False, drafts=True).problems)


@pytest.mark.parametrize("spoil", [spoil_a_link, spoil_the_salt, spoil_a_page, spoil_a_token])
def test_what_is_wrong_is_noticed(monkeypatch, spoil):
    spoil(monkeypatch)
    problems = served(strict=False).problems
    assert {"stale", "wrong"} <= set(problems), "both what was read and what came of it"


def test_the_end_of_sequence_token_does_come():
    engine = CheckedEngine(formats()["exact"], num_bytes=2_000_000)
    params = SamplingParams(n=8, temperature=1.0, seed=0, max_tokens=400)
    engine.submit("r", [1, 2, 3], params)
    scripts = list(engine.runner.scripts.values())
    engine.drain()
    assert any(script.output[-1] == EOS for script in scripts)
