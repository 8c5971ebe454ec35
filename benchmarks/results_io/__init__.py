"""Result files: the machine they are of, and how they are written."""

__all__ = [
    "environment",
    "result_file",
]
