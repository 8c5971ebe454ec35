"""K and V of sealed pages, rebuilt for chunks of prompts."""

__all__ = [
    "reference",
    "triton",
]
