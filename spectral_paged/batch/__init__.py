"""Batch files: JSONL lines in, one record a line out, resumable.

It knows the LLM and OpenAI's forms.
"""

__all__ = [
    "file",
    "run",
]
