"""Triton's interpreter, without what it does again at every call of a function by a kernel."""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter


def patch_the_language_once() -> None:
    """A kernel patches the language for its run, and each function that it calls does so again.

    That finds nothing left to patch, and looking takes a third of the time of a kernel.
    """
    patch = interpreter._patch_lang

    def patch_unless_patched(fn):
        seen = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if seen and not any(tl.core.is_builtin(language.load) for language in seen):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = patch_unless_patched
