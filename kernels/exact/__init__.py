"""Writing and reading of exact pages."""

__all__ = [
    "reference",
    "triton",
]
