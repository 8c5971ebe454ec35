"""Requests of a throughput run: token ids and output lengths, drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_paged.errors import InvalidRequestError

DATASETS = ("random", "sharegpt", "prefix_repetition")
SHORTEST_PROMPT, SHORTEST_OUTPUT = 4, 4  # tokens; shorter conversations are left out


@dataclass(frozen=True, slots=True)
class Job:
    """One request; exactly `output_len` tokens are generated, whatever they are."""

    prompt_token_ids: list[int]
    output_len: int


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Arguments of a workload, named as in vLLM."""

    dataset: str = "random"
    dataset_path: Path | None = None
    num_prompts: int = 64
    input_len: int = 1024
    output_len: int | None = None  # default 128; for `sharegpt`, as long as the answer was
    range_ratio: float = 0.0
    num_prefixes: int = 4
    prefix_len: int = 512
    seed: int = 0


def jobs_of(
    options: WorkloadOptions, vocab_size: int, max_model_len: int, tokenizer: Any
) -> list[Job]:
    """The requests of a run.

    ```
    random             lengths uniform in [(1 - r) L, (1 + r) L], tokens uniform
    prefix_repetition  one of `num_prefixes` beginnings of `prefix_len`, then `input_len` own tokens
    sharegpt           first turn of a conversation, as long an answer as it had
    ```

    Raises:
        InvalidRequestError: unknown dataset, a file that is missing or has no usable line, lengths
            that the model does not take.
    """
    rng = random.Random(options.seed)
    if options.dataset == "sharegpt":
        jobs = list(_conversations(options, tokenizer, max_model_len))
    elif options.dataset in DATASETS:
        jobs = list(_synthetic(options, rng, vocab_size))
    else:
        raise InvalidRequestError(f"--dataset {options.dataset!r}: use {', '.join(DATASETS)}")
    longest = max(len(job.prompt_token_ids) + job.output_len for job in jobs)
    if longest > max_model_len:
        raise InvalidRequestError(
            f"a request has {longest} tokens with its output; the model takes {max_model_len}: "
            "lower --input-len or --output-len"
        )
    return jobs


def _synthetic(options: WorkloadOptions, rng: random.Random, vocab_size: int) -> Iterator[Job]:
    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    def about(length: int) -> int:
        reach = int(length * options.range_ratio)
        return max(1, rng.randint(length - reach, length + reach))

    output_len = 128 if options.output_len is None else options.output_len
    repeats = options.dataset == "prefix_repetition"
    prefixes = [tokens(options.prefix_len) for _ in range(options.num_prefixes if repeats else 0)]
    for i in range(options.num_prompts):
        prefix = prefixes[i % len(prefixes)] if prefixes else []
        yield Job(prefix + tokens(about(options.input_len)), about(output_len))


def _conversations(options: WorkloadOptions, tokenizer: Any, max_model_len: int) -> Iterator[Job]:
    """Jobs of the conversations in a JSONL file; short and long ones are left out, as in vLLM.

    A line is `{"conversations": [{"value": ..}, {"value": ..}]}` or
    `{"prompt": .., "answer": ..}`."""
    path = options.dataset_path
    if path is None or not path.is_file():
        raise InvalidRequestError(
            f"--dataset sharegpt needs --dataset-path FILE (JSONL); {path} is no file"
        )
    if tokenizer is None:
        raise InvalidRequestError("--dataset sharegpt needs a model with a tokenizer")
    taken = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if taken == options.num_prompts:
            return
        if not line.strip():
            continue
        prompt, answer = _turns(line, f"{path}:{number}")
        ids = list(tokenizer(prompt)["input_ids"])
        length = options.output_len
        if length is None:
            length = len(tokenizer(answer)["input_ids"])
        if len(ids) < SHORTEST_PROMPT or length < SHORTEST_OUTPUT:
            continue
        if len(ids) + length > max_model_len:
            continue
        taken += 1
        yield Job(ids, length)
    if not taken:
        raise InvalidRequestError(f"{path} has no conversation that fits {max_model_len} tokens")


def _turns(line: str, where: str) -> tuple[str, str]:
    try:
        data = json.loads(line)
        if "conversations" in data:
            first, second = data["conversations"][:2]
            return str(first["value"]), str(second["value"])
        return str(data["prompt"]), str(data.get("answer", ""))
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"{where} is no conversation ({error!r}): a line is "
            '{"conversations": [{"value": "question"}, {"value": "answer"}]} or '
            '{"prompt": "question", "answer": "answer"}'
        ) from None
