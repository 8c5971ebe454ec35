"""The parts of decode attention in Triton, for every GPU that Triton supports."""

__all__ = [
    "apply",
    "attend",
    "exact",
    "finish",
    "project",
]
