"""Run a JSONL batch through an LLM: bounded queue, records as lines finish, resume."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spectral_paged.batch.file import (
    BatchLine,
    OutputFile,
    count_lines,
    error_record,
    read_lines,
    result_record,
)
from spectral_paged.engine import counted_refusal
from spectral_paged.errors import SpectralPagedError
from spectral_paged.llm import LLM
from spectral_paged.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class LineResult:
    """The record of one line. `failed`: it is an error's."""

    record: dict[str, Any]
    failed: bool
    num_tokens: int = 0


@dataclass(slots=True)
class BatchSummary:
    """Lines by outcome: `skipped` ones were finished by an earlier run."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    generated_tokens: int = 0

    @property
    def num_lines(self) -> int:
        """Lines that have a record."""
        return self.done + self.failed + self.skipped

    def count(self, result: LineResult) -> None:
        """One more line has its record."""
        self.failed += result.failed
        self.done += not result.failed
        self.generated_tokens += result.num_tokens


def serve_lines(llm: LLM, lines: Iterator[BatchLine]) -> Generator[LineResult, None, None]:
    """Results in the order in which lines finish; fewer than `2 * max_num_seqs` are in flight.

    A line that cannot be served becomes an error record. Closing the iterator, or an error in it,
    aborts what still runs.
    """
    limit = 2 * llm.engine.scheduler.config.max_num_seqs
    in_flight: dict[str, BatchLine] = {}
    more = True
    try:
        while more or in_flight:
            while more and len(in_flight) < limit:
                line = next(lines, None)
                if line is None:
                    more = False
                    continue
                try:
                    in_flight[_submit(llm, line)] = line
                except SpectralPagedError as error:
                    yield LineResult(error_record(line, error), failed=True)
            for output in llm.engine.step() if in_flight else ():
                line = in_flight.pop(output.request_id, None) if output.finished else None
                if line is not None:  # else it goes on, or is not of this run
                    yield _result(line, output, llm.model_name)
    finally:
        for request_id in in_flight:
            llm.engine.abort(request_id)


def _submit(llm: LLM, line: BatchLine) -> str:
    """Queue a line; its request id."""
    request_id = f"line-{line.number}"
    with counted_refusal(llm.engine.counters, request_id):
        if line.error is not None:
            raise line.error
        prompt = line.prompt
        if line.messages is not None:
            prompt = llm.chat_tokens(line.messages)
    assert prompt is not None, "a line without an error has a prompt"
    llm.engine.add_request(request_id, prompt, line.params, cache_salt=line.cache_salt)
    return request_id


def _result(line: BatchLine, output: RequestOutput, model_name: str) -> LineResult:
    if output.error is not None:
        return LineResult(error_record(line, output.error), failed=True)
    num_tokens = sum(len(c.token_ids) for c in output.outputs)
    return LineResult(result_record(line, output, model_name), False, num_tokens)


class BatchRun:
    """Serves the lines of a file that its output does not hold yet.

    An error record counts as finished, so a resume does not try its line again.
    """

    def __init__(self, llm: LLM, source: Path, output: OutputFile) -> None:
        self.llm = llm
        self.source = source
        self.output = output
        self.summary = BatchSummary()
        self.total = 0

    def run(self, defaults: Mapping[str, Any], *, quiet: bool = False) -> BatchSummary:
        """Serve every line that the output file does not hold yet.

        Args:
            defaults: sampling values for lines that name none.

        Raises:
            InvalidRequestError: the output file belongs to another input.
        """
        self.total = count_lines(self.source)
        bar = tqdm(total=self.total, desc="generate", unit="line", disable=quiet)
        lines = unfinished_lines(self.source, self.output, defaults, self.summary)
        try:
            with closing(serve_lines(self.llm, lines)) as results:
                for result in results:
                    self.output.write(result.record)
                    self.summary.count(result)
                    bar.update(self.summary.num_lines - bar.n)
            bar.update(self.summary.num_lines - bar.n)
        finally:
            bar.close()
        return self.summary

    @property
    def progress(self) -> tuple[int, int]:
        """Lines that have a record, and lines in all (0 before `run`)."""
        return self.summary.num_lines, self.total


def unfinished_lines(
    source: Path, output: OutputFile, defaults: Mapping[str, Any], summary: BatchSummary
) -> Iterator[BatchLine]:
    """Lines that `output` has no record of; the others are counted as skipped.

    Raises:
        InvalidRequestError: the output file belongs to another input.
    """
    for line in read_lines(source, defaults):
        if output.has(line):
            summary.skipped += 1
        else:
            yield line
