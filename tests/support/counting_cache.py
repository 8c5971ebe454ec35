"""A cache made of counters, to test a scheduler without tensors."""

from __future__ import annotations

from spectral_paged.scheduler import Request, Scheduler, SchedulerConfig

BLOCK = 8  # tokens a slot of the counting cache


class CountingCache:
    """A cache of slots of `BLOCK` tokens that seals a block every `seal_every` tokens."""

    def __init__(self, num_slots, chunk=10**9, seal_every=10**9, seats=10**9):
        self.num_slots, self.chunk, self.seal_every, self.seats = (
            num_slots,
            chunk,
            seal_every,
            seats,
        )
        self.stored: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.asked: dict[str, tuple] = {}
        self.resumed: dict[str, bool] = {}
        self.prefetched: dict[str, bool | None] = {}  # answers for sequences that are not True
        self.forgotten: dict[str, bool] = {}  # `forget` of each sequence that was freed
        self.cached = self.num_resets = 0  # tokens of every prefix hit; slots that a reset frees

    def _used(self):
        return sum(-(-(self.stored[s] + self.reserved[s]) // BLOCK) for s in self.stored)

    def add_sequence(
        self,
        seq_id,
        *,
        num_prompt_tokens,
        token_ids=None,
        cache_salt="",
        pinned_spans=(),
        resumed=False,
        max_cached_tokens=None,
    ):
        assert seq_id not in self.stored
        if len(self.stored) >= self.seats:
            return None
        self.asked[seq_id] = num_prompt_tokens, token_ids, cache_salt, pinned_spans
        self.resumed[seq_id] = resumed
        self.stored[seq_id], self.reserved[seq_id] = self.cached, 0
        return self.cached

    def prefetch(self, seq_id, **prompt):
        return self.prefetched.get(seq_id, True)

    def cancel_prefetch(self, seq_id):
        self.prefetched.pop(seq_id, None)

    def try_reserve(self, seq_id, num_new):
        before = self.reserved[seq_id]
        assert num_new > before, "a reservation only grows"
        self.reserved[seq_id] = num_new
        if self._used() > self.num_slots:
            self.reserved[seq_id] = before
            return False
        return True

    def cancel_reservation(self, seq_id):
        assert seq_id in self.reserved
        self.reserved[seq_id] = 0

    def chunk_limit(self, seq_id):
        assert seq_id in self.stored
        return self.chunk

    def seals_due(self, seq_id, num_new):
        before = self.stored[seq_id]
        return (before + num_new) // self.seal_every - before // self.seal_every

    def num_tokens(self, seq_id):
        return self.stored[seq_id]

    def progress(self, seq_ids):
        stored = [self.stored[seq_id] for seq_id in seq_ids]
        return stored, [self._is_quiet(seq_id) for seq_id in seq_ids]

    def _is_quiet(self, seq_id):
        return self.stored[seq_id] % BLOCK != 0 and self.seals_due(seq_id, 1) == 0

    def sequence_stats(self, seq_id):
        sealed = self.stored[seq_id] // self.seal_every
        return {"pages_sealed": sealed, "host_cached_tokens": 0, "disk_cached_tokens": 0}

    def free(self, seq_id, *, forget=False):
        del self.stored[seq_id], self.reserved[seq_id]
        self.forgotten[seq_id] = forget

    def reset_prefix_cache(self):
        self.num_resets += 1
        return 0

    def step(self, output):
        for seq_id, count in output.new_tokens.items():
            unreserved = count == 1 and self._is_quiet(seq_id) and not self.reserved[seq_id]
            assert unreserved or self.reserved[seq_id] == count
            self.stored[seq_id] += count
            self.reserved[seq_id] = 0
        assert not any(self.reserved.values()), "a reservation outlived its step"


def request(name, length):
    return Request(name, list(range(length)), length)


def scheduler(cache, requests, **budgets):
    """A scheduler with these budgets, to which the requests are added."""
    s = Scheduler(cache, SchedulerConfig(**budgets))
    for r in requests:
        s.add(r)
    return s
