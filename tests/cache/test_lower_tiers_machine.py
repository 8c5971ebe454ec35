"""The engine over a pool, host memory and disk as a state machine, with a script of every token.

Copies are late and fail, records are evicted, forgotten and damaged at any time, memory that is
free is poisoned, and every tier is whole after every operation.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spectral_paged import SamplingParams
from support.checked_engine import CheckedEngine
from support.digit_model import VOCAB, formats
from support.late_copies import LateCopier, NoThread

# format, bytes of the pool, of host memory and of disk, steps queued ahead, layers that stay exact,
# and how many sequences of operations
MACHINES = {
    "post-ahead": ("post", 520_000, 400_000, 0, True, (), 10),
    "frame-exempt": ("frame", 1_600_000, 800_000, 1_500_000, False, (1,), 15),
    "bare": ("bare", 800_000, 160_000, 400_000, False, (), 25),
    "exact-ahead": ("exact", 1_000_000, 700_000, 0, True, (), 8),
    "exact-tight": ("exact", 400_000, 300_000, 700_000, True, (), 15),
}
EVENTS = {"finished", "aborted", "passed", "given up", "evicted_records", "failures", "damaged"}
SEEN = EVENTS | {"host", "disk"}


class TiersMachine(RuleBasedStateMachine):
    machine_name = "post-ahead"
    total: Counter

    @initialize(
        seats=st.sampled_from([4, 2]),
        most=st.sampled_from([12, 3, 0]),
        failing=st.sampled_from([0.05, 0.0]),
    )
    def start(self, seats, most, failing):
        name, num_bytes, host_bytes, disk_bytes, ahead, exempt, _ = MACHINES[self.machine_name]
        store = {"kv_host_memory": host_bytes}
        self.folder = None
        if disk_bytes:
            self.folder = Path(tempfile.mkdtemp())
            store |= {"kv_store": self.folder, "kv_store_size": disk_bytes}
        self.engine = CheckedEngine(
            formats()[name],
            num_bytes=num_bytes,
            seats=seats,
            ahead=ahead,
            exempt_layers=exempt,
            model_fingerprint="digits",
            **store,
        )
        self.lower = self.engine.cache._lower
        self.host = self.lower.tiers[0]
        if self.folder is not None:
            disk = self.lower.tiers[1]
            disk.flush()
            for threads in (disk._writer, disk._readers, disk._looker):
                threads.shutdown()
            disk._writer = disk._readers = disk._looker = NoThread()
        self.copier = self.host._copier = LateCopier(most=most, failing=failing)
        self.num_submitted = 0
        ahead = self.lower.moves.ahead
        give_up = ahead._no_room

        def counted(*args, **kwargs):
            self.total["given up"] += 1
            return give_up(*args, **kwargs)

        ahead._no_room = counted

    @rule(
        family=st.integers(0, 2),
        shared=st.sampled_from([1700, 1217, 1088, 640]),
        own=st.sampled_from([1, 64, 300]),
        most=st.sampled_from([3, 60, 1]),
        heat=st.sampled_from([0.0, 1.0]),
        salt=st.sampled_from(["", "", "", "b"]),
        pins=st.sampled_from([(), (), (), ((580, 600),)]),
    )
    def submit(self, family, shared, own, most, heat, salt, pins):
        base = torch.Generator().manual_seed(family)
        rest = torch.Generator().manual_seed(100 + self.num_submitted)
        prompt = torch.randint(VOCAB, (shared,), generator=base).tolist()
        prompt += torch.randint(VOCAB, (own,), generator=rest).tolist()
        params = SamplingParams(temperature=heat, max_tokens=most)
        self.engine.submit(f"r{self.num_submitted}", prompt, params, salt, pins)
        self.num_submitted += 1

    def _step(self):
        self.engine.step()
        running = {r.request_id for r in self.engine.engine.scheduler.running}
        waiting = {r.request_id for r in self.engine.engine.scheduler.waiting}
        self.total["passed"] += bool(set(self.lower.moves.ahead._loads) & waiting) and bool(running)

    @precondition(lambda self: self.engine.running)
    @rule(count=st.sampled_from([60, 1, 3]))
    def steps(self, count):
        for _ in range(count):
            if self.engine.running:
                self._step()

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.running))))

    @rule(reset_store=st.sampled_from([False, False, False, True]))
    def lose_the_pools_prefixes(self, reset_store):
        self.engine.cache.reset_prefix_cache(reset_store=reset_store)
        self.engine.cache.check_integrity()

    @precondition(lambda self: self.host._records)
    @rule(data=st.data())
    def forget_a_record(self, data):
        self.host.forget(data.draw(st.sampled_from(sorted(self.host._records))))
        self.engine.cache.check_integrity()

    @precondition(lambda self: self.folder is not None)
    @rule(place=st.integers(0, 1 << 20), lose=st.booleans())
    def damage_a_file(self, place, lose):
        """A bit is flipped in any records on disk and they are wanted, or another process evicts
        one."""
        if not lose:
            self._ask_for_all()  # else it may be that nobody ever wants what is damaged
        files = sorted(self.folder.glob("*.page"))
        if lose and files:
            files[place % len(files)].unlink()
        if lose:
            return
        for path in files:
            data = bytearray(path.read_bytes())
            data[place % len(data)] ^= 1 << place % 8
            path.write_bytes(data)
        self._ask_for_all()

    def _ask_for_all(self):
        self.host.forget_all()
        self.engine.reset_prefix_cache()
        for family in range(3):
            self.submit(family, 1700, 1, 1, 0.0, "", ())
        self.drain()

    @rule(failing=st.sampled_from([0.05, 0.0, 0.3]))
    def let_copies_fail(self, failing):
        self.copier.failing = failing

    @rule()
    def come_back(self):
        """Everything ends, and the pool forgets it."""
        self.drain()
        self.engine.reset_prefix_cache()

    def drain(self):
        for _ in range(4000):
            if self.engine.running:
                self._step()
        assert not self.engine.running, "requests never end"

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.drain()
        assert not self.lower.moves.ahead._loads, "a request that ended is still loaded"
        held = [group.borrowed for group in self.engine.cache.groups]
        assert not any(held), "slots are borrowed for nobody"
        stats = self.engine.cache.stats()
        assert stats["store_failures"]["host"] == self.copier.num_failed
        self.total.update(self.engine.count)
        self.total["host"] += stats["prefix_hit_tokens_by_tier"]["host"]
        for figure in ("evicted_records", "failures"):
            self.total[figure] += stats[f"store_{figure}"]["host"]
        if self.folder is not None:
            most = MACHINES[self.machine_name][3]
            assert sum(f.stat().st_size for f in self.folder.glob("*.page")) <= most
            self.total["disk"] += stats["prefix_hit_tokens_by_tier"]["disk"]
            self.total["damaged"] += stats["store_failures"]["disk"]
        self.engine.cache.close()
        if self.folder is not None:
            shutil.rmtree(self.folder)


def test_any_order_of_operations_gives_the_scripts_tokens():
    total = Counter()
    for name, (*_, examples) in MACHINES.items():
        machine = type("Machine", (TiersMachine,), {"machine_name": name, "total": total})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                phases=[Phase.generate],  # to shrink a case takes minutes
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert all(total[what] for what in SEEN), total
