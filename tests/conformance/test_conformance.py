"""The conformance kit against the example's loop, and against loops with a fault."""

from __future__ import annotations

import importlib.util

import pytest

from spectral_paged.conformance import Conformance
from spectral_paged.errors import ConformanceError
from support.paths import ROOT

PATH = ROOT / "examples" / "embed_in_engine.py"
SPEC = importlib.util.spec_from_file_location("embed_in_engine", PATH)
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


def make(config, loop=None):
    return (loop or example.ServingLoop)(
        config.model,
        format=config.format,
        cache_options=config.cache_options,
        max_model_len=config.cache_options.max_model_len,
        max_step_tokens=config.max_step_tokens,
    )


@pytest.fixture(scope="module")
def kit():
    return Conformance(make)


@pytest.mark.parametrize("check", Conformance.CHECKS)
def test_the_example_is_conformant(kit, check):
    evidence = getattr(kit, check)()
    assert evidence.steps
    if check == "preemption_changes_nothing":
        assert evidence.preemptions
    if check == "prefix_hits_change_nothing":
        assert evidence.prefix_hit_tokens
    assert bool(evidence.store_hit_tokens) == (check == "store_hits_change_nothing")


class MovedTable:
    """A rotary table that is asked for other positions."""

    def __init__(self, table, move):
        self.table, self.move = table, move

    def apply(self, x, positions):
        return self.table.apply(x, self.move(positions))


class StaysAt512(example.ServingLoop):
    """Wrong positions: they end where the first chunk does."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.table = MovedTable(self.table, lambda positions: positions.clamp_max(512))


class LosesAToken(example.ServingLoop):
    """Every fifth token reaches nobody."""

    def step(self):
        found = super().step()
        self.count = getattr(self, "count", 0) + 1
        return {} if self.count % 5 == 0 else found


class KeepsSequences(example.ServingLoop):
    """Ends requests and frees nothing."""

    def release(self, name, *, forget=False):
        self.waiting.pop(name, None)
        self.running.pop(name, None)


class KeepsWaitingOnes(example.ServingLoop):
    """A release before admission is forgotten."""

    def release(self, name, *, forget=False):
        if name in self.running:
            super().release(name, forget=forget)


class ResumesAsPrompt(example.ServingLoop):
    """What was generated before a preemption counts as prompt afterwards."""

    def _admit(self, name):
        request = self.waiting[name]
        request.num_prompt_tokens = len(request.token_ids)
        return super()._admit(name)


class ResumesWithThePromptAlone(example.ServingLoop):
    """What was generated before a preemption is forgotten."""

    def _admit(self, name):
        request = self.waiting[name]
        del request.token_ids[request.num_prompt_tokens :]
        return super()._admit(name)


class NeverPreempts(example.ServingLoop):
    """Where `reserve` gives None it waits for ever."""

    def _reserve(self):
        plan = reserved(self)
        return plan if plan is not None else self.cache.plan({})


def reserved(loop):
    """What one step of `loop` wants, or None."""
    wanted = {}
    for name in [*loop.running, *loop.waiting]:
        if name in loop.running or loop._admit(name):
            due = len(loop.running[name].token_ids) - loop.cache.num_tokens(name)
            wanted[name] = min(due, loop.cache.chunk_limit(name))
    return loop.cache.reserve(wanted)


class HidesFailures(example.ServingLoop):
    """Goes on with token 0 where a sequence has failed."""

    bad = frozenset()

    def step(self):
        found = super().step()
        self.bad |= {name for name, got in found.items() if isinstance(got, Exception)}
        return found | {name: [0] for name in self.bad}

    def release(self, name, *, forget=False):
        self.bad -= set() if forget else {name}
        super().release(name, forget=forget)


class SharesOneSequence(example.ServingLoop):
    """A prefix cache of its own that believes any two long prompts to begin alike."""

    def start(self, prompt, max_tokens=None):
        self.known = getattr(self, "known", list(prompt[:64]))
        shared = self.known + list(prompt[64:]) if len(prompt) > 64 else prompt
        return super().start(shared, max_tokens)


@pytest.mark.parametrize(
    "loop, check, says",
    [
        (StaysAt512, "exact_tokens_are_those_of_transformers", "positions"),
        (LosesAToken, "exact_tokens_are_those_of_transformers", "token"),
        (KeepsSequences, "released_sequences_leave_nothing", "still holds"),
        (KeepsSequences, "exact_tokens_are_those_of_transformers", "still holds|got no token"),
        (KeepsWaitingOnes, "released_sequences_leave_nothing", "has ended"),
        (ResumesAsPrompt, "preemption_changes_nothing", "stays the same"),
        (ResumesWithThePromptAlone, "preemption_changes_nothing", "resumed"),
        (NeverPreempts, "preemption_changes_nothing", "got no token"),
        (HidesFailures, "nan_fails_its_own_sequence", "NaN"),
        (SharesOneSequence, "batch_mates_change_nothing", "served alone"),
    ],
)
def test_a_fault_is_noticed(loop, check, says):
    broken = Conformance(lambda config: make(config, loop))
    with pytest.raises(ConformanceError, match=says):
        getattr(broken, check)()


def test_run_takes_every_check_and_says_what_happened(monkeypatch, kit):
    for check in Conformance.CHECKS:
        monkeypatch.setattr(Conformance, check, lambda self, name=check: name)
    assert kit.run() == {check: check for check in Conformance.CHECKS}


def test_checks_are_all_that_the_kit_has():
    public = [n for n, v in vars(Conformance).items() if callable(v) and not n.startswith("_")]
    assert set(public) - {"run"} == set(Conformance.CHECKS)


def test_the_example_is_held_in_the_head():
    """The loop and its forward pass, without what prints: under 150 lines."""
    loop = PATH.read_text(encoding="utf-8").split("\ndef main(")[0]
    assert len(loop.splitlines()) < 150
