"""Something that happens at a chosen line of other code, as garbage collection may at any."""

from __future__ import annotations

import sys
from contextlib import contextmanager


@contextmanager
def at_a_line(number, action, *modules):
    """Call `action` before the `number`-th line (from 0) that `modules` run inside the block.

    Yields a list that is empty until then, so that a loop over lines knows when it is done.
    """
    files, done, lines = {module.__file__ for module in modules}, [], iter(range(number + 1))

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and next(lines, None) == number:
            done.append(frame.f_lineno)
            action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield done
    finally:
        sys.settrace(before)
