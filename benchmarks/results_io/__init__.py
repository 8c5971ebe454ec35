"""Results of benchmarks: their files, the machine behind them, and tables of them."""

__all__ = [
    "environment",
    "result_file",
    "text_table",
]
