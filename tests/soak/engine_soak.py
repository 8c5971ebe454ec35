"""Random requests on an engine over the model of integers, which notices every wrong byte."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

from spectral_paged import SamplingParams
from support.checked_engine import CheckedEngine
from support.digit_model import VOCAB, formats

SECONDS_PER_ENGINE = 15  # before one of another format and size takes over
SMALLEST = {"exact": 340_000}


def soak_engine(seconds, seed):
    """(figures, examples of faults) of engines of every format, one after another."""
    rng, start, total, examples = random.Random(seed), time.monotonic(), Counter(), []
    wrong = dict.fromkeys(("lost", "stale", "wrong", "integrity"), 0)
    names = itertools.cycle(formats())
    while (left := start + seconds - time.monotonic()) > 0:
        name = next(names)
        exempt = (1,) if name != "exact" and rng.random() < 0.2 else ()
        smallest = SMALLEST.get(name, 640_000 if exempt else 330_000)
        engine = CheckedEngine(
            formats()[name],
            num_bytes=smallest + rng.choice([0, 40_000, 200_000, 600_000]),
            seats=rng.randint(2, 8),
            budget=rng.choice([64, 300, 700, 2000]),
            seals=rng.choice([1, 64]),
            ahead=rng.random() < 0.6,
            exempt_layers=exempt,
            strict=False,
        )
        try:
            work(engine, rng, time.monotonic() + min(left, SECONDS_PER_ENGINE))
        except Exception as error:  # an engine that raises loses what it served
            engine.problems.setdefault("lost", []).append(f"{error!r}")
        total.update(engine.figures())
        for kind, found in engine.problems.items():
            wrong[kind] += len(found)
            examples += [f"{kind}: {what} ({name})" for what in found[:2]]
    row = {"operations": total.pop("operations"), "steps": total.pop("steps"), **total}
    return row | wrong | {"seconds": round(time.monotonic() - start)}, examples[:10]


def work(engine, rng, until):
    """Do random operations until the time `until`, then run every request to its end."""
    bases = [[rng.randrange(VOCAB) for _ in range(1300)] for _ in range(3)]
    number = 0
    while time.monotonic() < until and not engine.problems:
        engine.count["operations"] += 1
        what = rng.random()
        if what < 0.06 and len(engine.running) < 12:
            prompt = rng.choice(bases)[: rng.choice([0, 64, 640, 700, 1217])]
            prompt = prompt + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 63, 64, 300]))]
            pins = rng.choice([(), (), (), ((0, 10), (580, 1100)), ((640, 641),)])
            engine.submit(f"r{number}", prompt, params(rng), rng.choice(["", "", "b"]), pins)
            number += 1
        elif what < 0.07 and engine.running:
            engine.abort(rng.choice(sorted(engine.running)))
        elif what < 0.072:
            engine.reset_prefix_cache()
        elif what < 0.074:
            engine.drain()
        elif engine.running:
            engine.step()
    engine.drain()


def params(rng):
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 4]),
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.choice([None, 1, 2]),
        max_tokens=rng.choice([1, 7, 60, 150, 700]),
        min_tokens=rng.choice([0, 1]),
        stop_token_ids=rng.choice([[], [3, 5]]),
        ignore_eos=rng.random() < 0.7,
    )
