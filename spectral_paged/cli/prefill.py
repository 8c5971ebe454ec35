"""`spectral-paged prefill` computes the prompts of a file once, so that later runs find them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from spectral_paged.cli.input_file import add_input, check_input
from spectral_paged.errors import InvalidRequestError, SpectralPagedError
from spectral_paged.options import (
    DEFAULT_MODEL,
    LLMOptions,
    LoRARequest,
    add_options,
    given_options,
)

if TYPE_CHECKING:
    from spectral_paged.batch.file import BatchLine
    from spectral_paged.llm import LLM

LINES_AT_ONCE = 64


def add_prefill(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_input(parser, "JSONL, a prompt a line, in the forms that `generate` reads")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="alias, hub id, folder or .gguf file"
    )
    parser.add_argument("--quiet", action="store_true", help="no bar, no summary")
    add_options(parser, LLMOptions)


def prefill(args: argparse.Namespace) -> int:
    """Compute a file's prompts into a store; 1 if some could not be computed or kept."""
    check_input(args.input)
    options = given_options(args, LLMOptions)
    if options.get("kv_store") is None:
        raise InvalidRequestError("prefill keeps prompts for later runs: name a folder, --kv-store")
    from tqdm import tqdm

    from spectral_paged.batch.file import count_lines, read_lines
    from spectral_paged.batch.source import check_source
    from spectral_paged.llm import LLM

    check_source(args.input)
    counts = {"computed": 0, "kept": 0, "bad": 0}
    bar = tqdm(total=count_lines(args.input), unit="prompt", disable=args.quiet)
    with LLM(args.model, **options) as llm, bar:
        lines = read_lines(args.input, {"max_tokens": 1})
        while some := list(islice(lines, LINES_AT_ONCE)):
            _prefill(llm, some, counts)
            bar.update(len(some))
            bar.set_postfix(counts)
        stats: Mapping[str, Any] = llm.stats()
        failures = sum(stats["store_failures"].values())
    if failures:  # the log has said of each kind what failed
        print(
            f"{args.input}: not all is kept: {failures} reads or writes of {options['kv_store']} "
            "failed; run again once the folder takes files",
            file=sys.stderr,
        )
    if not args.quiet:
        print(
            f"{args.input}: {counts['computed']} tokens computed, {counts['kept']} kept before, in "
            f"{options['kv_store']}; {counts['bad']} lines are bad"
        )
    return 1 if counts["bad"] or failures else 0


def _prefill(llm: LLM, lines: list[BatchLine], counts: dict[str, int]) -> None:
    """Compute lines, and tell of each that is bad."""
    from spectral_paged.batch.run import lora_of

    prompts: list[dict[str, Any]] = []
    adapters: list[LoRARequest | None] = []
    numbers: list[int] = []
    for line in lines:
        try:
            prompt, adapter = _prompt_of(llm, line), lora_of(llm, line)
            prompts.append(prompt)
            adapters.append(adapter)
            numbers.append(line.number)
        except SpectralPagedError as error:
            _tell(line.number, error, counts)
    try:
        outputs: list[Any] = []
        if prompts:
            outputs += llm.prefill(prompts, use_tqdm=False, lora_request=adapters)
    except SpectralPagedError as error:
        if error.outputs is None:
            raise
        outputs = list(error.outputs)
        for number, output in zip(numbers, outputs, strict=True):
            if output is None or output.error is not None:
                _tell(number, error if output is None else output.error, counts)
    for output in outputs:
        if output is not None and output.error is None:
            kept = output.metrics.num_cached_tokens
            counts["kept"] += kept
            counts["computed"] += len(output.prompt_token_ids) - kept


def _prompt_of(llm: LLM, line: BatchLine) -> dict[str, Any]:
    if line.error is not None:
        raise line.error
    if line.messages is not None:
        tools = () if line.tools is None else line.tools.tools
        tokens: Any = llm.chat_tokens(line.messages, tools=tools, **line.template)
    else:
        tokens = line.prompt
    if line.params is not None and line.params.truncate_prompt_tokens is not None:
        tokens = llm.engine.prompt_encoder.encode(
            tokens, truncate_prompt_tokens=line.params.truncate_prompt_tokens
        )
    kind = "prompt" if isinstance(tokens, str) else "prompt_token_ids"
    return {kind: tokens, "cache_salt": line.cache_salt}


def _tell(number: int, error: BaseException, counts: dict[str, int]) -> None:
    counts["bad"] += 1
    print(f"line {number}: {error}", file=sys.stderr)
