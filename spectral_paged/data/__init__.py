"""Text that calibrations read."""

__all__ = []
