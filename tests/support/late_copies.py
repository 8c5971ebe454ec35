"""Copies to and from host memory that take their time, or fail, as those of a GPU may."""

from __future__ import annotations

import random
from concurrent.futures import Future

from spectral_paged.store.copies import join, scatter


class LateCopy:
    """A copy that happens when it was asked for a number of times, or when somebody waits."""

    failed = False

    def __init__(self, make, asks):
        self._make, self._asks = make, asks

    def wait(self):
        if self._make is not None:
            self._make()
        self._make = None

    hold = wait  # the device's later work sees the copy

    @property
    def is_done(self):
        self._asks -= 1
        if self._asks < 0:
            self.wait()
        return self._make is None


class NoThread:
    """An executor that does everything at once, so that a test runs the same again."""

    def submit(self, call, *args):
        done = Future()
        try:
            done.set_result(call(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, **how):
        pass


class LateCopier:
    """Copies late by up to `most` questions; a share of `failing` raises when it begins.

    What goes out is read when the copy begins, and its places may be overwritten at once. What
    comes in is read and written at the last moment.
    """

    def __init__(self, seed=0, most=3, failing=0.0):
        self.random, self.most, self.failing = random.Random(seed), most, failing
        self.num_failed = 0

    def _begin(self, make):
        if self.random.random() < self.failing:
            self.num_failed += 1
            raise RuntimeError("a copy failed")
        return LateCopy(make, self.random.randint(0, self.most))

    def save(self, views, pieces):
        flat = join(views)

        def make():
            for source, piece in zip(flat.split([len(p) for p in pieces]), pieces, strict=True):
                piece.copy_(source)

        return self._begin(make)

    def load(self, pieces, views):
        return self._begin(lambda: scatter(join(pieces), views))
