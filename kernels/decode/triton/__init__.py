"""The parts of decode attention in portable Triton."""

__all__ = [
    "apply",
    "attend",
    "exact",
    "finish",
    "project",
]
