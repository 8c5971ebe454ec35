"""Result files of benchmarks: their names, their content on disk, and the machine behind them."""

__all__ = [
    "environment",
    "result_file",
]
