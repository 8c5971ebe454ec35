"""Run a JSONL batch through an LLM: bounded queue, records as lines finish, resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spectral_paged.batch_file import (
    BatchLine,
    OutputFile,
    count_lines,
    error_record,
    read_lines,
    result_record,
)
from spectral_paged.errors import SpectralPagedError
from spectral_paged.llm import LLM
from spectral_paged.request_events import refusing


@dataclass(slots=True)
class BatchSummary:
    """Lines by outcome: `skipped` ones were finished by an earlier run."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    generated_tokens: int = 0


class BatchRun:
    """Feeds lines to the engine while fewer than `2 * max_num_seqs` are in flight.

    A line that cannot be served becomes an error record; it counts as finished, so a resume does
    not try it again.
    """

    def __init__(self, llm: LLM, source: Path, output: OutputFile) -> None:
        self.llm = llm
        self.source = source
        self.output = output
        self.summary = BatchSummary()
        self.total = 0
        self._in_flight: dict[str, BatchLine] = {}

    def run(self, defaults: Mapping[str, Any], *, quiet: bool = False) -> BatchSummary:
        """Serve every line that the output file does not hold yet.

        Args:
            defaults: sampling values for lines that name none.

        Raises:
            InvalidRequestError: the output file belongs to another input.
        """
        lines = read_lines(self.source, defaults)
        limit = 2 * self.llm.engine.scheduler.config.max_num_seqs
        more = True
        self.total = count_lines(self.source)
        bar = tqdm(total=self.total, desc="generate", unit="line", disable=quiet)
        try:
            while more or self._in_flight:
                while more and len(self._in_flight) < limit:
                    line = next(lines, None)
                    if line is None:
                        more = False
                    elif not self._submit(line):
                        bar.update()
                if self._in_flight:
                    bar.update(self._step())
        finally:
            for request_id in self._in_flight:
                self.llm.engine.abort(request_id)
            bar.close()
        return self.summary

    @property
    def progress(self) -> tuple[int, int]:
        """Lines that have a record, and lines in all (0 before `run`)."""
        return self.summary.done + self.summary.failed + self.summary.skipped, self.total

    def _submit(self, line: BatchLine) -> bool:
        """Queue a line; False where it needs no engine: finished before, or bad."""
        if self.output.has(line):
            self.summary.skipped += 1
            return False
        request_id, engine = f"line-{line.number}", self.llm.engine
        try:
            with refusing(engine.counters, request_id):
                if line.error is not None:
                    raise line.error
                prompt = line.prompt
                if line.messages is not None:
                    prompt = self.llm.chat_tokens(line.messages)
            assert prompt is not None, "a line without an error has a prompt"
            engine.add_request(request_id, prompt, line.params, cache_salt=line.cache_salt)
        except SpectralPagedError as error:
            self._fail(line, error)
            return False
        self._in_flight[request_id] = line
        return True

    def _step(self) -> int:
        """One engine step; lines that it finished."""
        count = 0
        for output in self.llm.engine.step():
            line = self._in_flight.pop(output.request_id, None) if output.finished else None
            if line is None:
                continue  # it goes on, or is not of this run
            count += 1
            if output.error is not None:
                self._fail(line, output.error)
                continue
            self.output.write(result_record(line, output, self.llm.model_name))
            self.summary.done += 1
            self.summary.generated_tokens += sum(len(c.token_ids) for c in output.outputs)
        return count

    def _fail(self, line: BatchLine, error: SpectralPagedError) -> None:
        self.output.write(error_record(line, error))
        self.summary.failed += 1
