"""The command line, which may import every other package."""

from __future__ import annotations

from spectral_paged.cli.commands import (
    main,
)

__all__ = [
    "main",
]
