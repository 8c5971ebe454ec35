"""The command line; it knows everything."""

from __future__ import annotations

from spectral_paged.cli.commands import (
    main,
)

__all__ = [
    "main",
]
