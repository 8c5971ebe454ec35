"""A soak: long random work on the block pool, the engine and a small real model.

```
python tests/soak                                  all three; make soak
python tests/soak --only model --minutes 60 --device cuda
```

Prints a table; the exit code is 1 where anything was lost, stale, wrong or not whole.
"""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from pathlib import Path

import torch

SUPPORT = Path(__file__).resolve().parents[1] / "support" / "__init__.py"
runpy.run_path(str(SUPPORT))["make_importable"]()

Row = dict[str, int | float | str]  # the figures of one part
PROBLEMS = ("lost", "stale", "wrong", "integrity", "failed", "leaks")  # figures that must be 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["pool", "engine", "model"], help="one part; default all")
    parser.add_argument("--minutes", type=float, default=2.0, help="of engine, and of model")
    parser.add_argument("--operations", type=int, default=1_000_000, help="of the block pool")
    parser.add_argument("--device", default="cpu", help="of the model: cpu or cuda")
    parser.add_argument("--format", default="spectral-int8", help="preset of the model's cache")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def table(rows: dict[str, Row]) -> str:
    """The table as text: a line for each figure, a column for each part."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *rows]]
    for name in names:
        cells = [row.get(name, "-") for row in rows.values()]
        lines.append([name, *(f"{c:,}" if isinstance(c, int | float) else c for c in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from engine_soak import soak_engine
    from model_soak import soak_model
    from pool_soak import soak_pool

    parts = {
        "pool": lambda: soak_pool(options.operations, options.seed),
        "engine": lambda: soak_engine(options.minutes * 60, options.seed),
        "model": lambda: soak_model(
            options.minutes * 60, options.seed, options.device, options.format
        ),
    }
    rows = {}
    for name in parts if options.only is None else [options.only]:
        rows[name], examples = parts[name]()
        for example in examples:
            print(f"{name}: {example}", file=sys.stderr)
    print(table(rows))
    return int(any(row.get(problem) for row in rows.values() for problem in PROBLEMS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("spectral_paged").setLevel(logging.ERROR)  # preemptions warn, and are wanted
    sys.exit(main())
