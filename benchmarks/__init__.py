"""The benchmarks of `spectral-paged bench`, over every package but `cli` and `server`."""

__all__ = [
    "capacity",
    "command",
    "decode",
    "parsers",
    "quality",
    "results_io",
    "seal",
    "steps",
    "throughput",
    "unsloth",
]
