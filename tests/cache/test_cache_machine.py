"""SpectralKVCache as a state machine: any order of operations gives the outputs of the rule.

K and V of a token are a function of its id and position. So sequences with a common prefix really
share content, and every output can be computed from the token ids. Freed slots are poisoned: a
stale read turns the output into NaN.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spectral_paged.cache import SpectralKVCache, Visibility
from spectral_paged.kernels.math.rotary import read_keys, stored_keys
from spectral_paged.pages import PageFormat, decode_pages, encode_pages
from spectral_paged.pool.slot_pool import SlotKind
from spectral_paged.rope import RotaryTable
from support.effort import examples

HQ, H, D, VOCAB, LONGEST = 4, 2, 16, 40, 2100
ROPE = RotaryTable.from_theta(10000.0, D, max_positions=LONGEST)
FORMATS = {
    "pre-512": PageFormat.preset("spectral-int8", num_kv_heads=H, head_dim=D, prefill_segment=512),
    "post-1024": PageFormat.preset(
        "spectral-int8-post", num_kv_heads=H, head_dim=D, prefill_segment=1024
    ),
    "exact": PageFormat.preset("exact", num_kv_heads=H, head_dim=D),
}
FORMATS |= {f"{name}, layers differ": FORMATS[name] for name in ("pre-512", "exact")}
PAIRS = RotaryTable.from_inv_freq(
    torch.tensor([0.7, 0.2, 0.03]), max_positions=LONGEST, interleaved=True
)

ALIKE = [(ROPE, None)]
DIFFERENT = [(ROPE, None), (PAIRS, 1100), (None, 130), (None, None)]  # rotary table, window
UNTURNED = RotaryTable(torch.ones(LONGEST, 1), torch.zeros(LONGEST, 1))
SOFTCAP = 4.0
_g = torch.Generator().manual_seed(7)
Q_TABLE = torch.randn(VOCAB, HQ, D, generator=_g)
K_TABLE = torch.randn(VOCAB, H, D, generator=_g)
V_TABLE = torch.randn(VOCAB, H, D, generator=_g)


@functools.cache
def wave(position: int, side: int) -> torch.Tensor:
    """Something that differs at every position, so that a token read elsewhere shows."""
    return torch.sin(torch.arange(D) * 0.7 + position * 0.013 + side)


def content(token_ids, start, end, salt="", rope=ROPE):
    """q [T, HQ, D], k after RoPE and v [T, H, D] of the tokens in `start..end`; salts stand for
    models that differ."""
    ids = torch.tensor(token_ids[start:end])
    span = torch.arange(start, end)
    sides = (2 * len(salt), 2 * len(salt) + 1)
    waves = [torch.stack([wave(t, s) for t in range(start, end)])[:, None] for s in sides]
    k = K_TABLE[ids] + waves[0]
    return Q_TABLE[ids], k if rope is None else rope.apply(k, span), V_TABLE[ids] + waves[1]


def answer(format, token_ids, prompt, t, pins=(), salt="", layer=ALIKE[0], softcap=None):
    """What the query at `t` must get, [HQ, D], by the rule of what a query sees."""
    rope, window = layer
    q, k, v = content(token_ids, 0, t + 1, salt, rope)
    k, v = k.clone(), v.clone()
    visible = Visibility.of(format).visible_blocks(t, prompt)
    for b in range(visible if window is None or window > 1024 else 0):
        first = format.num_landmark_tokens + 512 * b
        if any(start < first + 512 and end > first for start, end in pins):
            continue
        span = torch.arange(first, first + 512)
        table = rope or UNTURNED
        rows = [x.transpose(0, 1) for x in table.rows(span)]
        halves = table.halves(k[span]).transpose(0, 1)
        stored = stored_keys(halves, *rows, format.rope)
        page = encode_pages(stored[None], v[span].transpose(0, 1)[None], format)
        new_k, new_v = (x[0] for x in decode_pages(page, format))
        back = read_keys(new_k, *rows, format.rope).transpose(0, 1)
        k[span] = back[..., table.halves(torch.arange(D)).argsort()]
        v[span] = new_v.transpose(0, 1)
    grouped = q[t].view(H, HQ // H, D)
    scores = torch.einsum("hgd,thd->hgt", grouped, k) * D**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        scores[..., : max(0, t + 1 - window)] = float("-inf")
    return torch.einsum("hgt,thd->hgd", torch.softmax(scores, -1), v).reshape(HQ, D)


class CacheMachine(RuleBasedStateMachine):
    """The model: token ids of every sequence and how many of them are stored."""

    format_name = "pre-512"
    seen: dict[str, int]

    @initialize(extra=st.integers(0, 6), seats=st.integers(2, 5))
    def start(self, extra, seats):
        self.format = FORMATS[self.format_name]
        smallest = 400_000 if self.format.seals else 900_000
        differ = "differ" in self.format_name
        self.layers, self.softcap = (DIFFERENT, SOFTCAP) if differ else (ALIKE, None)
        ropes, windows = zip(*self.layers)
        self.cache = SpectralKVCache(
            num_layers=len(self.layers),
            num_q_heads=HQ,
            num_kv_heads=H,
            head_dim=D,
            rope=ropes,
            sliding_windows=windows,
            softcap=self.softcap,
            format=self.format,
            kv_cache_bytes=(smallest + 150_000 * extra) * (3 if differ else 1),
            max_num_seqs=seats,
            max_model_len=LONGEST,
            debug_poison=True,
        )
        self.seats = seats
        self.tokens: dict[str, list[int]] = {}
        self.prompt: dict[str, int] = {}
        self.pins: dict[str, tuple[tuple[int, int], ...]] = {}
        self.salt: dict[str, str] = {}
        self.next_id = 0

    def _name(self):
        self.next_id += 1
        return f"s{self.next_id}"

    @rule(
        family=st.integers(0, 1),
        shared=st.sampled_from([1217, 640, 700, 65, 64, 63, 0]),
        own=st.sampled_from([650, 575, 64, 63, 1, 300]),
        resumed=st.sampled_from([0, 1, 130]),
        pins=st.sampled_from([(), ((0, 65),), ((600, 601),), ((0, 10), (576, 1100))]),
        salt=st.sampled_from(["", "", "b"]),
    )
    def add(self, family, shared, own, resumed, pins, salt):
        """A prompt that shares its beginning with its family, perhaps with generated tokens."""
        base = torch.Generator().manual_seed(family)
        rest = torch.Generator().manual_seed(100 + self.next_id)
        ids = torch.randint(VOCAB, (shared,), generator=base).tolist()
        ids += torch.randint(VOCAB, (own + resumed,), generator=rest).tolist()
        name = self._name()
        pins = tuple((a, min(b, shared + own)) for a, b in pins if a < shared + own)
        cached = self.cache.add_sequence(
            name,
            num_prompt_tokens=shared + own,
            token_ids=ids,
            pinned_spans=pins,
            cache_salt=salt,
        )
        if len(self.tokens) == self.seats:
            assert cached is None
            return
        assert cached is not None and cached < len(ids) and cached % 64 == 0
        self.tokens[name], self.prompt[name], self.pins[name] = ids, shared + own, pins
        self.salt[name] = salt

    def _pick(self, data):
        return data.draw(
            st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, max_size=4, unique=True)
        )

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def prefill(self, data):
        """Chosen sequences catch up with their tokens, in chunks as large as may be."""
        names = self._pick(data)
        for _ in range(12):
            left = {n: len(self.tokens[n]) - self.cache.num_tokens(n) for n in names}
            new = {n: min(c, self.cache.chunk_limit(n)) for n, c in left.items() if c}
            if not new or not self._run(new):
                return

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def small_chunk(self, data):
        """Chosen sequences get chunks of sizes of their own, one token among them."""
        new = {}
        for name in self._pick(data):
            left = len(self.tokens[name]) - self.cache.num_tokens(name)
            if left:
                most = min(left, self.cache.chunk_limit(name))
                new[name] = min(most, data.draw(st.sampled_from([65, 1, 64, 2])))
        if new:
            self._run(new)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.sampled_from([70, 1, 3]))
    def decode(self, data, count):
        """Chosen sequences that have caught up generate tokens together."""
        names = [n for n in self._pick(data) if self.cache.num_tokens(n) == len(self.tokens[n])]
        names = [n for n in names if len(self.tokens[n]) + count <= LONGEST]
        ids = torch.Generator().manual_seed(self.next_id + count)
        for _ in range(count if names else 0):
            for name in names:
                self.tokens[name].append(int(torch.randint(VOCAB, (), generator=ids)))
            if not self._run(dict.fromkeys(names, 1)):
                for name in names:
                    self.tokens[name].pop()
                return

    def _run(self, new):
        """One step; False where the pool said "not now", and then nothing has changed."""
        before = self.cache.stats()
        plan = self.cache.reserve(new)
        if plan is None:
            after = self.cache.stats()
            assert after["exact_pages_in_use"] == before["exact_pages_in_use"]
            assert after["pages_in_use"] == before["pages_in_use"]
            return False
        self.cache.begin_step(plan)
        outs = []
        for layer, (rope, _) in enumerate(self.layers):
            parts = [
                content(
                    self.tokens[e.seq_id], e.start, e.start + e.num_new, self.salt[e.seq_id], rope
                )
                for e in plan.entries
            ]
            outs.append(self.cache.attend(layer, *(torch.cat(x) for x in zip(*parts))))
        assert not self.cache.end_step().failed
        flat = 0
        for e in plan.entries:
            for t in {e.start, e.start + e.num_new - 1}:
                name = e.seq_id
                for layer, out in zip(self.layers, outs):
                    want = answer(
                        self.format,
                        self.tokens[name],
                        self.prompt[name],
                        t,
                        self.pins[name],
                        self.salt[name],
                        layer,
                        self.softcap,
                    )
                    assert torch.allclose(out[flat + t - e.start], want, atol=3e-4, rtol=3e-4)
                sealed = Visibility.of(self.format).visible_blocks(t, self.prompt[name])
                if "queries_past_pins" in self.seen and sealed and self.pins[name]:
                    self.seen["queries_past_pins"] += 1
            flat += e.num_new
        return True

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), follow=st.booleans())
    def fork(self, data, follow):
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        if self.cache.num_tokens(parent) != len(self.tokens[parent]):
            return
        child = self._name()
        ids = list(self.tokens[parent])
        salt = self.salt[parent]
        if not self.cache.fork(parent, child, token_ids=ids if follow else None, cache_salt=salt):
            assert child not in self.cache
            return
        self.tokens[child], self.prompt[child] = ids, self.prompt[parent]
        self.pins[child], self.salt[child] = self.pins[parent], salt

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), forget=st.booleans())
    def free(self, data, forget):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.free(name, forget=forget)
        del self.tokens[name], self.prompt[name], self.pins[name]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def preempt_and_resume(self, data):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.free(name)
        cached = self.cache.add_sequence(
            name,
            num_prompt_tokens=self.prompt[name],
            token_ids=self.tokens[name],
            pinned_spans=self.pins[name],
            cache_salt=self.salt[name],
        )
        assert cached is not None and cached < len(self.tokens[name])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), stored=st.booleans())
    def give_up_a_step(self, data, stored):
        """A step is reserved and dropped, before it began or after K and V were written."""
        names = self._pick(data)
        left = {n: len(self.tokens[n]) - self.cache.num_tokens(n) for n in names}
        new = {n: min(c, self.cache.chunk_limit(n)) for n, c in left.items() if c}
        before = {n: self.cache.num_tokens(n) for n in names}
        plan = self.cache.reserve(new) if new else None
        if plan is None:
            return
        if stored:
            self.cache.begin_step(plan)
            wrong = [torch.full((sum(new.values()), h, D), 7.0) for h in (HQ, H, H)]
            for layer in range(len(self.layers)):
                self.cache.attend(layer, *wrong)
            self.cache.abort_step()
        else:
            for name in new:
                self.cache.cancel_reservation(name)
        assert {n: self.cache.num_tokens(n) for n in names} == before

    @rule()
    def reset_prefix_cache(self):
        self.cache.reset_prefix_cache()
        stats = self.cache.stats()
        assert stats["pages_cached"] == stats["exact_pages_cached"] == 0

    @invariant()
    def pools_tables_and_sequences_agree(self):
        if hasattr(self, "cache"):
            self.cache.check_integrity()

    def teardown(self):
        if hasattr(self, "cache"):
            stats = self.cache.stats()
            for key in self.seen.keys() & stats.keys():
                self.seen[key] += stats[key]


@pytest.mark.parametrize("name", FORMATS)
def test_any_order_of_operations_gives_the_written_answer(name):
    seen = dict.fromkeys(("prefix_hit_tokens", "slots_evicted"), 0)
    if FORMATS[name].seals:
        seen |= dict.fromkeys(("pages_sealed", "pages_attended", "queries_past_pins"), 0)
    machine = type("Machine", (CacheMachine,), {"format_name": name, "seen": seen})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(24, 200) if "differ" in name else examples(60, 500),
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert all(seen.values()), f"something was never exercised: {seen}"


def test_slots_that_move_together_keep_their_content():
    """Every slab half in use by exact pages, and then a seal asks for a slot of the other kind."""
    machine = type("Machine", (CacheMachine,), {"format_name": "pre-512", "seen": {}})()
    machine.start(extra=2, seats=200)
    cache, names = machine.cache, []
    blocks = cache.groups[0].arena.slots

    def add(length):
        name = f"n{len(names)}"
        ids = torch.randint(VOCAB, (length,)).tolist()
        cache.add_sequence(name, num_prompt_tokens=length, token_ids=ids)
        machine.tokens[name], machine.prompt[name], machine.pins[name] = ids, length, ()
        machine.salt[name] = ""
        names.append(name)
        return name

    def run_to_the_end(name):
        while left := len(machine.tokens[name]) - cache.num_tokens(name):
            assert machine._run({name: min(left, cache.chunk_limit(name))})

    per_slab = blocks.slots_per_slab[SlotKind.EXACT]
    for _ in range(blocks.num_slabs * per_slab - 11):
        run_to_the_end(add(10))
    long = add(639)
    run_to_the_end(long)
    for i, name in enumerate(names[:-1]):
        if i % per_slab:
            cache.free(name, forget=True)
    assert cache.stats()["slots_moved"] == 0
    machine.tokens[long].extend([1, 2, 3])
    for _ in range(3):
        assert machine._run({long: 1})
    assert cache.stats()["slots_moved"] > 0 and cache.stats()["pages_in_use"] == 1
    cache.check_integrity()
    survivors = names[:-1:per_slab]
    for name in survivors:
        machine.tokens[name].append(5)
    assert machine._run(dict.fromkeys(survivors[:8], 1))
