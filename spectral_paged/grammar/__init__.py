"""Grammars say which tokens may come next in a completion that has to have a form.

The package imports sampling parameters. llguidance, which does the work, is imported in it alone,
and with the first grammar.
"""

from __future__ import annotations

from spectral_paged.grammar.compiler import (
    GrammarCompiler,
)
from spectral_paged.grammar.constraint import (
    Constraint,
    Grammar,
)
from spectral_paged.grammar.vocabulary import (
    Vocabulary,
)

__all__ = [
    "Constraint",
    "Grammar",
    "GrammarCompiler",
    "Vocabulary",
]
