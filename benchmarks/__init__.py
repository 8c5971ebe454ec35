"""What `spectral-paged bench` runs; it knows everything but the command line and the server."""

__all__ = [
    "capacity",
    "command",
    "decode",
    "quality",
    "results_io",
    "seal",
    "steps",
    "throughput",
    "unsloth",
]
