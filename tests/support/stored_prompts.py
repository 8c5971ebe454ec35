"""Prompts of a small cache that are in host memory, and requests that ask for them."""

from __future__ import annotations

import time

from support.cache_feed import Feed, drive, fmt, make
from support.late_copies import LateCopier

LENGTH = 1900
IDS = list(range(LENGTH))
PROMPT = IDS[:1800]
FORMATS = {
    "int8-512": lambda: fmt(),
    "int8-1024": lambda: fmt(segment=1024),
    "bare": lambda: fmt(num_landmark_tokens=0, hot_tokens=0),
    "hot": lambda: fmt(hot_tokens=640),
    "exact": lambda: fmt("exact"),
}


def host_of(cache):
    return cache._lower.tiers[0]


def ready(cache, seq_id, prompt, ids, **how):
    """Ask for a prefix until it is there; the number of questions."""
    ends, asked = time.monotonic() + 30, 0
    while time.monotonic() < ends:
        asked += 1
        if cache.prefetch(seq_id, num_prompt_tokens=prompt, token_ids=ids, **how):
            return asked
        cache.check_integrity()
        if asked > 100:  # threads of a disk want the processor too
            time.sleep(0.001)
    raise AssertionError("it never comes")


def warm_cache(**how):
    cache = make(kv_host_memory=8 << 20, **how)
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
    cache.free("a")
    cache.reset_prefix_cache()
    return cache


def loading(cache, seq_id="b"):
    """Begin a load of IDS that stays on its way."""
    copier = host_of(cache)._copier = LateCopier()
    copier.random.randint = lambda a, b: 10**9
    assert cache.prefetch(seq_id, num_prompt_tokens=1800, token_ids=PROMPT) is False
