"""Arithmetic that several ops share: rotary embedding, scores, and merging of partial results."""

__all__ = [
    "rotary",
    "scores",
]
