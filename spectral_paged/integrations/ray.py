"""Serving of batch files on a Ray cluster: `pip install '.[ray]'`.

```
driver     lines of the input that have no record yet -> blocks of lines in the object store
Ray Data   one actor a GPU, each with an LLM of its own, takes block after block
driver     writes each line's record once, as blocks come back
```

Ray restarts an actor that died and repeats its block, so a line may be computed twice. It is
written once, because only the driver writes, and it keeps the numbers of the lines it waits for.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spectral_paged.batch.file import BatchLine, OutputFile, count_lines
from spectral_paged.batch.records import error_record
from spectral_paged.batch.run import BatchSummary, LineResult, serve_lines, unfinished_lines
from spectral_paged.errors import ClusterError, InvalidRequestError, missing_extra, shown
from spectral_paged.models.loader import EMBEDDED, model_name
from spectral_paged.models.option_checks import check_options
from spectral_paged.options import LLMOptions

try:
    import pyarrow as pa
    import ray
    import ray.data
    import ray.exceptions
except ImportError as error:
    raise missing_extra("--ray needs the package ray with its data library", "ray") from error

MAX_ATTEMPTS = 4  # tries at one block of lines: a block that kills every worker ends the run
TASKS_PER_WORKER = 8  # blocks a worker, if there are enough lines: all workers end about together
LOADING = 0  # in place of a line's number while a worker loads its model; lines count from 1
SEATS_PER_TASK = 4  # most lines of a block, in `max_num_seqs`: few steps run half empty


class Attempts:
    """Counts of tries at each block, kept for the cluster, because an actor that died forgets."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def take(self, number: int) -> int:
        """Count a try at the block that begins with line `number`, or at `LOADING`.

        A try at a block resets the count of `LOADING`, because a worker has loaded the model.
        """
        if number != LOADING:
            self._counts[LOADING] = 0
        self._counts[number] += 1
        return self._counts[number]


class LineWorker:
    """An actor of the cluster, which serves lines by an LLM of its own and returns records.

    Args:
        model: alias, hub id, or a path that every node has; absolute, because a worker's working
            directory is not the driver's.
        options: keyword arguments of `LLM`; paths as above.
        take: counts tries at the block that begins with a line number, and at `LOADING`.
        max_loads: most tries of all workers at loading a model while none takes a block.
        name: the model's name in records; default `model`.

    Raises:
        ClusterError: workers die while they load the model; Ray would restart them without end.
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        take: Callable[[int], int],
        max_loads: int = MAX_ATTEMPTS,
        name: str | None = None,
    ) -> None:
        if take(LOADING) > max_loads:
            raise ClusterError(
                f"workers died while they loaded {model!r}, {max_loads} times: look for memory "
                "that ran out (less --kv-cache-bytes, fewer --ray-workers)"
            )
        from spectral_paged.llm import LLM

        self._llm = LLM(model, **options)
        self._llm.model_name = name or self._llm.model_name
        self._take = take

    def __call__(self, batch: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        """Columns `record` (JSON), `failed`, `num_tokens` of lines pickled in column `line`.

        Raises:
            ClusterError: `MAX_ATTEMPTS` workers died over these lines.
        """
        lines: list[BatchLine] = [pickle.loads(raw) for raw in batch["line"]]
        first, last = lines[0].number, lines[-1].number
        if self._take(first) > MAX_ATTEMPTS:
            raise ClusterError(
                f"{MAX_ATTEMPTS} workers died over lines {first} to {last}: look for memory that "
                "ran out (fewer --max-num-seqs, less --kv-cache-bytes), or leave these lines out"
            )
        results = list(serve_lines(self._llm, iter(lines)))
        return {
            "record": [json.dumps(result.record).encode() for result in results],
            "failed": [result.failed for result in results],
            "num_tokens": [result.num_tokens for result in results],
        }


def run_batch(
    model: str | PathLike[str],
    source: str | PathLike[str],
    output: OutputFile,
    defaults: Mapping[str, Any],
    *,
    options: Mapping[str, Any],
    num_workers: int | None = None,
    address: str | None = None,
    quiet: bool = False,
) -> BatchSummary:
    """Serve on a Ray cluster every line that has no record in the output file.

    A cluster that this process has joined already is used. Else one is joined, or started on this
    machine, and left at the end.

    Args:
        model: alias, hub id, or a path that every node has; a relative one begins where the driver
            runs.
        defaults: sampling values for lines that name none.
        options: keyword arguments of `LLM`, plain values; a calibration file as `model`.
        num_workers: actors; default one for each GPU of the cluster. They take a GPU each, or,
            where `options["device"]` is `cpu` or the cluster has no GPU, a CPU each.
        address: the cluster's; default that of `RAY_ADDRESS`, else a cluster on this machine.

    Raises:
        FormatError: the format does not exist; no cluster is joined.
        InvalidRequestError: an option has a value that it does not take, the output file belongs to
            another input, or the cluster is too small.
        ClusterError: there is no cluster at `address`, a worker raised, or workers died too often.
    """
    check_options(LLMOptions(**options))
    with _joined(address):
        resource, num_workers = _workers(options.get("device", "auto"), num_workers)
        return _run(
            model_name(model),
            Path(source),
            output,
            defaults,
            options,
            resource,
            num_workers,
            quiet,
        )


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage is reported to Ray's makers
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(
            address or os.environ.get("RAY_ADDRESS"),
            include_dashboard=None if address or os.environ.get("RAY_ADDRESS") else False,
            log_to_driver=False,
            logging_level="warning",
        )
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {shown(address)}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _workers(device: str, wanted: int | None) -> tuple[str, int]:
    """The resource that each actor takes, `GPU` or `CPU`, and the number of actors."""
    found = ray.cluster_resources()
    resource = "GPU" if found.get("GPU") and device != "cpu" else "CPU"
    room = int(found.get(resource, 0))
    if wanted is None:
        if resource == "CPU":
            raise InvalidRequestError(
                "the Ray cluster has no GPU to count workers by: say how many with --ray-workers"
            )
        wanted = room
    if not 1 <= wanted <= room:
        raise InvalidRequestError(
            f"--ray-workers {wanted}: the Ray cluster has {room} {resource}, one for each worker"
        )
    return resource, wanted


def _run(
    model: str,
    source: Path,
    output: OutputFile,
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    resource: str,
    num_workers: int,
    quiet: bool,
) -> BatchSummary:
    summary = BatchSummary()
    total = count_lines(source)
    per_task = max(
        1,
        min(
            SEATS_PER_TASK * int(options.get("max_num_seqs", LLMOptions.max_num_seqs)),
            (total - len(output.finished)) // (TASKS_PER_WORKER * num_workers),
        ),
    )
    bar = tqdm(total=total, desc="generate", unit="line", disable=quiet)
    waiting: set[int] = set()
    try:
        lines = unfinished_lines(source, output, defaults, summary)
        blocks = list(_blocks(lines, per_task, output, summary, waiting))
        bar.update(summary.num_lines - bar.n)
        if blocks:
            results = _results(blocks, model, options, resource, num_workers, per_task)
            for result in results:
                if result.record["line"] not in waiting:
                    continue  # a block that was run twice
                waiting.discard(result.record["line"])
                output.write(result.record)
                summary.count(result)
                bar.update(summary.num_lines - bar.n)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"{len(waiting)} lines have no record, for the Ray cluster gave up: {_cause(error)}\n"
            f"finished lines are in {output.path}; the same command goes on from there"
        ) from error
    finally:
        bar.close()
    if waiting:
        raise ClusterError(
            f"{len(waiting)} lines came back from no worker, line {min(waiting)} the first: run "
            "the same command again"
        )
    return summary


def absolute_model(model: str) -> str:
    """The name of a model for workers: a path becomes absolute, an alias or hub id stays.

    Workers have another working directory and home. An alias comes before a path, as in `resolve`.
    """
    path = Path(model).expanduser()
    is_path = path.exists() or model.endswith(".gguf") or model.startswith((".", "~"))
    return str(path.absolute()) if is_path and model not in EMBEDDED else model


def absolute_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the path of the calibration file, if there is one, made absolute."""
    given = options.get("calibration")
    if not isinstance(given, str | Path) or given in ("auto", "online"):
        return dict(options)
    return dict(options) | {"calibration": str(Path(given).absolute())}


def _cause(error: ray.exceptions.RayError) -> str:
    """The error that a worker raised: the last such line of the tracebacks that Ray reports."""
    raised = re.findall(r"^(?!ray\.)[\w.]*(?:Error|Exception): .+$", str(error), re.MULTILINE)
    return str(raised[-1]) if raised else str(error)


def _blocks(
    lines: Iterator[BatchLine],
    size: int,
    output: OutputFile,
    summary: BatchSummary,
    waiting: set[int],
) -> Iterator[Any]:
    """References to blocks of `size` lines; the record of a bad line is written at once.

    Args:
        waiting: a set to which the numbers of the lines are added.
    """
    good: list[bytes] = []
    for line in lines:
        if line.error is not None:
            result = LineResult(error_record(line, line.error), failed=True)
            output.write(result.record)
            summary.count(result)
            continue
        waiting.add(line.number)
        good.append(pickle.dumps(line))
        if len(good) == size:
            yield ray.put(pa.table({"line": good}))
            good = []
    if good:
        yield ray.put(pa.table({"line": good}))


def _results(
    blocks: list[Any],
    model: str,
    options: Mapping[str, Any],
    resource: str,
    num_workers: int,
    per_task: int,
) -> Iterator[LineResult]:
    """Results as blocks come back; a result may come twice."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    answers = ray.data.from_arrow_refs(blocks).map_batches(
        LineWorker,
        fn_constructor_args=(
            absolute_model(model),
            absolute_options(options),
            lambda number: ray.get(attempts.take.remote(number)),
            MAX_ATTEMPTS * num_workers,
            model,
        ),
        batch_size=per_task,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=1 if resource == "GPU" else None,
        num_cpus=1 if resource == "CPU" else None,
    )
    for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
        columns = (batch["record"], batch["failed"], batch["num_tokens"])
        for record, failed, num_tokens in zip(*columns, strict=True):
            yield LineResult(json.loads(record), bool(failed), int(num_tokens))
