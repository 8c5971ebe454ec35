"""Threads that share an engine take turns at its steps."""

from __future__ import annotations

from threading import Lock, get_ident


class Turns:
    """A lock that threads get in turn; a thread may take it again while it has it.

    With Python's own locks a thread that gives one up and asks for it again nearly always wins, and
    whoever waited meanwhile starves.
    """

    def __init__(self) -> None:
        self._next, self._held = Lock(), Lock()  # `_next` is with the thread that waits first
        self._owner, self._depth = 0, 0

    def __enter__(self) -> None:
        if self._owner != get_ident():
            with self._next:
                self._held.acquire()
            self._owner = get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = 0
            self._held.release()
