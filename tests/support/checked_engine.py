"""An engine over the model of integers that is checked after every operation."""

from __future__ import annotations

from collections import Counter

from spectral_paged.cache import SpectralKVCache
from spectral_paged.engine import Engine
from spectral_paged.errors import CapacityError, PoolError
from spectral_paged.options import SpeculativeConfig
from spectral_paged.scheduler import SchedulerConfig
from support.digit_model import DIM, EOS, LAYERS, LONGEST, ROPE, VOCAB, DigitRunner, scripts_of
from support.foretold_drafts import SPECULATION, foretell


class CheckedEngine:
    """Operations of an engine, each followed by the proof that nothing was lost or stale; `store`
    are options of tiers below its cache. With `drafts`, steps compute drafts, some of them wrong.

    Attributes:
        count: the number of events by kind: steps, requests, finished, aborted, refused, ...
        problems: descriptions of faults by kind (`stale`, `lost`, `wrong`, `integrity`); with
            `strict` the first fault raises instead.
    """

    def __init__(
        self,
        format,
        *,
        num_bytes,
        seats=6,
        budget=700,
        seals=64,
        ahead=False,
        exempt_layers=(),
        strict=True,
        drafts=False,
        **store,
    ):
        self.cache = SpectralKVCache(
            num_layers=LAYERS,
            num_q_heads=1,
            num_kv_heads=1,
            head_dim=DIM,
            rope=ROPE,
            format=format,
            kv_cache_bytes=num_bytes,
            max_num_seqs=seats,
            max_model_len=LONGEST,
            exempt_layers=exempt_layers,
            **store,
            debug_poison=True,
        )
        self.runner = DigitRunner(self.cache)
        self.engine = Engine(
            self.runner,
            self.cache,
            scheduler_config=SchedulerConfig(seats, budget, seals),
            eos_token_ids=[EOS],
            vocab_size=VOCAB,
            async_scheduling=ahead,
            speculative_config=SpeculativeConfig.read(SPECULATION) if drafts else None,
        )
        if drafts:
            foretell(self.engine, self._foretold, VOCAB)
        self.strict = strict
        self.count: Counter[str] = Counter()
        self.problems: dict[str, list[str]] = {}
        self.running: dict[str, int] = {}  # request id to `n`

    def _foretold(self, completion, count):
        """The tokens of a completion's sequence by its script, `count` if it has so many."""
        script = self.runner.scripts[completion.request.request_id]
        script.speak(count)
        return script.ids[:count]

    def _problem(self, kind, what):
        if self.strict:
            raise AssertionError(f"{kind}: {what}")
        self.problems.setdefault(kind, []).append(what)

    def _check(self):
        if self.runner.stale:
            self._problem("stale", self.runner.stale[0])
            self.runner.stale.clear()
        try:
            self.cache.check_integrity()
        except PoolError as error:
            self._problem("integrity", str(error))

    def submit(self, request_id, prompt, params, salt="", pins=()):
        """Add a request; False if the engine refuses it because it can never fit."""
        pins = tuple((a, min(b, len(prompt))) for a, b in pins if a < len(prompt))
        try:
            self.engine.add_request(request_id, prompt, params, cache_salt=salt, pinned_spans=pins)
        except CapacityError:
            self.count["refused"] += 1
            return False
        self.runner.scripts |= scripts_of(self.cache.format, request_id, prompt, params, salt, pins)
        self.running[request_id] = params.n
        self.count["requests"] += 1
        self.count["forks"] += params.n - 1
        self.count["pinned"] += bool(pins)
        self._check()
        return True

    def step(self):
        """Run one step and compare its outputs with the scripts."""
        for output in self.engine.step():
            if output.request_id not in self.running:
                self._problem("wrong", f"{output.request_id} was returned after its end")
                continue
            self._compare(output)
            if output.finished:
                self.count["finished"] += 1
                self._forget(output.request_id)
        self.count["steps"] += 1
        self._check()

    def _compare(self, output):
        if output.error is not None:
            self._problem("lost", f"{output.request_id} failed: {output.error}")
        for completion in output.outputs:
            script = self.runner.scripts[f"{output.request_id}#{completion.index}"]
            got, ended = completion.token_ids, completion.finish_reason
            script.speak(script.num_prompt + len(got) + 1)
            if got != script.output[: len(got)]:
                self._problem("wrong", f"{output.request_id} said {got}, not {script.output}")
            elif ended is not None and (ended, got) != (script.finish, script.output):
                self._problem("lost", f"{output.request_id} ended with {ended} after {len(got)}")

    def _forget(self, request_id):
        for index in range(self.running.pop(request_id)):
            del self.runner.scripts[f"{request_id}#{index}"]

    def abort(self, request_id):
        self.engine.abort(request_id)
        self._forget(request_id)
        self.count["aborted"] += 1
        self._check()

    def reset_prefix_cache(self):
        self.cache.reset_prefix_cache()
        stats = self.cache.stats()
        if stats["pages_cached"] or stats["exact_pages_cached"]:
            self._problem("integrity", "slots are cached after a reset")
        self._check()

    def drain(self, limit=20_000):
        """Step until every request has ended, and check that no slot is left in use."""
        for _ in range(limit):
            if not self.engine.has_unfinished():
                break
            self.step()
        for request_id in self.running:
            self._problem("lost", f"{request_id} never ended")
        stats = self.cache.stats()
        left = {k: stats[k] for k in ("num_sequences", "pages_in_use", "exact_pages_in_use")}
        if any(left.values()):
            self._problem("integrity", f"nothing runs, but {left}")

    def figures(self):
        """`count` with counters of engine and cache: preemptions, hits, evictions, pages, reads."""
        stats = self.engine.stats()
        names = ("preemptions", "prefix_hit_tokens", "slots_evicted", "slots_moved")
        sealed = ("pages_sealed", "pages_attended")
        drafts = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
        return self.count | Counter(
            {name: int(stats[name]) for name in names + sealed + drafts}
            | {"values_read": self.runner.num_values_read}
        )
