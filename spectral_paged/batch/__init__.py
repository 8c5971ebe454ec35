"""Batch files: a run reads JSONL lines, writes a record for each, and can be resumed.

The package imports the LLM and OpenAI's formats.
"""

__all__ = [
    "file",
    "records",
    "run",
    "source",
]
