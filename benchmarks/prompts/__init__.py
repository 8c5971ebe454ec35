"""What `spectral-paged bench prompts` measures: attention of prompt chunks, and whole prompts."""

__all__ = [
    "run",
]
