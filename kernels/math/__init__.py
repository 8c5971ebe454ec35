"""Arithmetic that several ops share: rotary embedding, scores, merging of partial results."""

__all__ = [
    "rotary",
    "scores",
]
