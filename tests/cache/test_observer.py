"""Observers of a cache get the events of that cache, and of no other."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.cache import CacheObserver, replace_encoders
from support.cache_feed import LAYERS, Feed, drive, fmt, make


class Notes(CacheObserver):
    """All that is told, in order."""

    def __init__(self):
        self.told = []

    def of(self, kind):
        return [args for name, *args in self.told if name == kind]


for _name in [n for n in vars(CacheObserver) if not n.startswith("_")]:

    def _note(self, *args, _name=_name):
        self.told.append((_name, *args))

    setattr(Notes, _name, _note)


def test_what_happened_is_told():
    cache, notes = make(exempt_layers=(1,)), Notes()
    feeds = {"a": Feed(1, 1300), "b": Feed(2, 700)}
    with cache.observe(notes):
        drive(cache, feeds, {"a": 1200, "b": 3}, {"a": 1300, "b": 700})
        cache.free("b")
    assert notes.of("added") == [["a", 1200], ["b", 3]] and notes.of("freed") == [["b"]]
    plans = [plan for (plan,) in notes.of("planned")]
    assert plans == [plan for plan, _ in notes.of("ended")]
    counts = {"a": 0, "b": 0}
    for plan in plans:
        for entry in plan.entries:
            assert entry.start == counts[entry.seq_id]
            counts[entry.seq_id] += entry.num_new
    assert counts == {"a": 1300, "b": 700}
    layers = [layer for layer, _, _ in notes.of("storing")]
    assert layers == list(range(LAYERS)) * len(plans)
    sizes = [len(k) for _, k, _ in notes.of("storing")]
    assert sizes == [plan.num_tokens for plan in plans for _ in range(LAYERS)]
    sealed = notes.of("sealed")
    assert [block for s, block, _ in sealed if s == "a"] == [0, 1]
    assert [block for s, block, _ in sealed if s == "b"] == [0]
    assert all(list(where) == [0] for _, _, where in sealed), "the other layer is exempt"
    assert cache.stats()["pages_sealed"] == len(sealed)


def test_a_sequence_that_reserve_adds_and_cannot_keep_comes_and_goes():
    cache, notes = make(kv_cache_bytes=1 << 20), Notes()
    with cache.observe(notes):
        assert cache.reserve(dict.fromkeys("abcdef", 512)) is None
    assert {s for s, _ in notes.of("added")} == {s for (s,) in notes.of("freed")} != set()
    assert not notes.of("planned")


def test_what_is_written_into_a_key_is_what_is_stored():
    class Spoils(CacheObserver):
        def storing(self, layer, k, v):
            v[0] = float("nan")

    cache, feed = make(), Feed(1, 8)
    with cache.observe(Spoils()):
        outs = drive(cache, {"a": feed}, {"a": 4}, {"a": 4})
    assert outs["a"].isnan().all()
    later = drive(cache, {"a": feed}, {"a": 4}, {"a": 6})
    assert later["a"][:, 4:6].isnan().all(), "it lies in the cache"


def test_observers_are_told_side_by_side_and_only_inside():
    cache, first, second = make(), Notes(), Notes()
    with cache.observe(first):
        cache.add_sequence("a", num_prompt_tokens=1)
        with pytest.raises(ZeroDivisionError), cache.observe(second):
            cache.add_sequence("b", num_prompt_tokens=2)
            raise ZeroDivisionError
        cache.add_sequence("c", num_prompt_tokens=3)
    cache.add_sequence("d", num_prompt_tokens=4)
    assert first.of("added") == [["a", 1], ["b", 2], ["c", 3]]
    assert second.of("added") == [["b", 2]]


def test_an_aborted_step_does_not_end():
    cache, notes = make(), Notes()
    with cache.observe(notes):
        cache.begin_step(cache.reserve({"a": 5}))
        cache.abort_step()
    assert len(notes.of("planned")) == 1 and not notes.of("ended")


def test_an_encoder_may_be_replaced_for_a_measurement():
    class Counts:
        backend = "counted"

        def __init__(self, encoder):
            self.encoder, self.blocks = encoder, 0

        def warm_up(self, planes):
            self.encoder.warm_up(planes)

        def seal(self, planes, exact, pages, first):
            self.blocks += len(pages)
            return self.encoder.seal(planes, exact, pages, first)

    cache, plain, made = make(fmt("spectral-page")), make(fmt("spectral-page")), []

    def choose(encoder):
        made.append(Counts(encoder))
        return made[-1]

    replace_encoders(cache, choose)
    feeds = {"a": Feed(1, 1300)}
    outs, want = (drive(c, feeds, {"a": 1200}, {"a": 1300}) for c in (cache, plain))
    assert torch.equal(outs["a"], want["a"])
    assert [encoder.blocks for encoder in made] == [2]
    assert cache.stats()["seal_backend"] == "counted"
