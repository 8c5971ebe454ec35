"""A batch run serves the lines of a JSONL file with an LLM and writes records as they finish."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spectral_paged.batch.file import (
    BatchLine,
    OutputFile,
    count_lines,
    read_lines,
)
from spectral_paged.batch.records import error_record, result_record
from spectral_paged.engine import counted_refusal
from spectral_paged.errors import AdapterError, RequestFailedError, SpectralPagedError, shown
from spectral_paged.llm import LLM
from spectral_paged.options import LoRARequest
from spectral_paged.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class LineResult:
    """The record of one line; `failed`: it is an error record."""

    record: dict[str, Any]
    failed: bool
    num_tokens: int = 0


@dataclass(slots=True)
class BatchSummary:
    """The number of lines by outcome; an earlier run finished the `skipped` ones."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    generated_tokens: int = 0

    @property
    def num_lines(self) -> int:
        """The number of lines that have a record."""
        return self.done + self.failed + self.skipped

    def count(self, result: LineResult) -> None:
        """Count a line that got its record."""
        self.failed += result.failed
        self.done += not result.failed
        self.generated_tokens += result.num_tokens


def serve_lines(llm: LLM, lines: Iterator[BatchLine]) -> Generator[LineResult, None, None]:
    """Yield results in the order in which lines finish, with up to `2 * max_num_seqs` in flight.

    A line that cannot be served yields an error record. Closing the iterator, or an error in it,
    aborts running requests.
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
                    line = _with_tools(llm, line)
                    in_flight[_submit(llm, line)] = line
                except SpectralPagedError as error:
                    yield LineResult(error_record(line, error), failed=True)
            for output in llm.engine.step() if in_flight else ():
                line = in_flight.pop(output.request_id, None) if output.finished else None
                if line is not None:  # else it still runs, or belongs to another caller
                    yield _result(line, output, _model_of(llm, line))
    finally:
        for request_id in in_flight:
            llm.engine.abort(request_id)


def _with_tools(llm: LLM, line: BatchLine) -> BatchLine:
    """Return a line whose tools are bound to the model's form of calls."""
    if line.tools is None or line.params is None:
        return line
    tokenizer = llm.get_tokenizer()
    tools = line.tools.bound(tokenizer)
    return replace(line, tools=tools, params=tools.params(line.params, tokenizer))


def _submit(llm: LLM, line: BatchLine) -> str:
    """Queue a line and return its request id."""
    request_id = f"line-{line.number}"
    with counted_refusal(llm.engine.counters, request_id):
        if line.error is not None:
            raise line.error
        prompt = line.prompt
        assert line.params is not None, "a line without an error has sampling parameters"
        if line.messages is not None:
            prompt = llm.chat_tokens(
                line.messages,
                tools=() if line.tools is None else line.tools.tools,
                truncate_prompt_tokens=line.params.truncate_prompt_tokens,
                **line.template,
            )
        assert prompt is not None, "a line without an error has a prompt"
        own = {k: v for k, v in llm.sampling_defaults.items() if k not in line.named}
        params = replace(line.params, **own)
        lora = lora_of(llm, line)
    llm.engine.add_request(
        request_id, prompt, params, cache_salt=line.cache_salt, lora_request=lora
    )
    return request_id


def lora_of(llm: LLM, line: BatchLine) -> LoRARequest | None:
    """Return the adapter that a line names as its model.

    Where there are no adapters, a line may name any model, because files are written for others.

    Raises:
        AdapterError: the line names neither an adapter that is loaded nor the model.
    """
    if llm.adapters is None or line.model is None or line.model == llm.model_name:
        return None
    try:
        return llm.adapters.named(line.model)
    except AdapterError as error:
        raise AdapterError(
            f"model {shown(line.model)} is neither {shown(llm.model_name)} nor an adapter of "
            f"lora_modules: {error}"
        ) from None


def _model_of(llm: LLM, line: BatchLine) -> str:
    """Return the name in the record of a line that was served."""
    return llm.model_name if llm.adapters is None or line.model is None else line.model


def _result(line: BatchLine, output: RequestOutput, model_name: str) -> LineResult:
    if output.error is not None:
        return LineResult(error_record(line, output.error), failed=True)
    num_tokens = sum(len(c.token_ids) for c in output.outputs)
    try:
        record = result_record(line, output, model_name)
    except Exception as cause:  # of any type, and must end no other line
        error = RequestFailedError(
            f"the record of line {line.number} cannot be made: {shown(cause)}"
        )
        return LineResult(error_record(line, error), failed=True)
    return LineResult(record, False, num_tokens)


class BatchRun:
    """Serves the lines of a file that have no record in its output file.

    An error record counts as finished, so a resumed run does not serve its line again.
    """

    def __init__(self, llm: LLM, source: str | PathLike[str], output: OutputFile) -> None:
        self.llm = llm
        self.source = Path(source)
        self.output = output
        self.summary = BatchSummary()
        self.total = 0

    def run(self, defaults: Mapping[str, Any], *, quiet: bool = False) -> BatchSummary:
        """Serve every line that has no record in the output file.

        Args:
            defaults: sampling values for fields that a line does not have.

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
        """The number of lines that have a record, and of all lines (0 before `run`)."""
        return self.summary.num_lines, self.total


def unfinished_lines(
    source: Path, output: OutputFile, defaults: Mapping[str, Any], summary: BatchSummary
) -> Iterator[BatchLine]:
    """Yield the lines that have no record in `output`, and count the others as skipped.

    Raises:
        InvalidRequestError: the output file belongs to another input.
    """
    for line in read_lines(source, defaults):
        if output.has(line):
            summary.skipped += 1
        else:
            yield line
