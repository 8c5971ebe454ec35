"""`spectral-paged bench speculation`: decoding with drafts by n-gram look-up, and without.

Prompts are of real text and of this package's own code. What their answers have in common with
them differs:

    quote    the text again            nearly all of the answer stands in the prompt
    edit     code with a name changed  most of it
    summary  what the text says        names and phrases
    story    something else            nothing, so that drafts only cost

Greedy tokens are compared before anything is timed. In fp32 they are the same, or the run fails. In
16 bits another number of rows in a matrix product rounds otherwise, so that near ties may fall the
other way: a row tells how many outputs are the same. Times are of steps after all prompts are
computed.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import torch

from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import file_stem, model_label, write_result
from spectral_paged.benchmarks.results_io.text_table import table
from spectral_paged.benchmarks.throughput.backends import engine_of, forget
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import SpectralPagedError
from spectral_paged.llm import LLM
from spectral_paged.models.loader import LoadedModel, load_model
from spectral_paged.options import SpeculativeConfig
from spectral_paged.outputs import RequestOutputKind
from spectral_paged.sampling import SamplingParams
from spectral_paged.scheduler import Scheduler

BATCHES = (1, 8)
TEXT_CHARACTERS, CODE_CHARACTERS = 1600, 1800
PROMPTS = {
    "quote": "{text}\n\nHere is the same text again, word for word:\n\n",
    "edit": "```python\n{code}\n```\n\nThe same code, `request` renamed to `job`:\n\n```python\n",
    "summary": "{text}\n\nA summary of this text, in a few sentences:\n\n",
    "story": "A story about a {number}-year-old gardener who finds a door:\n\n",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A workload with drafts and without.

    tokens_per_second, plain_tokens_per_second: of steps that only decode, with drafts and without.
    gain: the first over the second.
    tokens_per_step: of a sequence, with drafts.
    acceptance: accepted tokens over drafted ones; None: nothing was drafted.
    same: outputs with the same tokens, of `batch`.
    """

    task: str
    batch: int
    tokens_per_second: float
    plain_tokens_per_second: float
    gain: float
    tokens_per_step: float
    acceptance: float | None
    same: int


@dataclass(frozen=True, slots=True)
class Run:
    """The tokens of each output, and the seconds, tokens and steps of decoding."""

    outputs: list[list[int]]
    seconds: float
    num_tokens: int
    num_steps: int


def prompts_of(task: str, count: int) -> list[str]:
    """As many prompts of a task, each with a text of its own as far as there are so many."""
    text = resources.files("spectral_paged.data").joinpath("calibration.txt").read_text("utf-8")
    code = inspect.getsource(Scheduler)
    found = []
    for number in range(count):
        parts: dict[str, Any] = {"number": 20 + number}
        for name, whole, size in (("text", text, TEXT_CHARACTERS), ("code", code, CODE_CHARACTERS)):
            begin = number * size // 2 % max(1, len(whole) - size)
            begin = whole.find("\n", begin) + 1
            parts[name] = whole[begin : begin + size].rpartition("\n")[0]
        found.append(PROMPTS[task].format(**parts))
    return found


def decode(llm: LLM, prompts: Sequence[str], num_tokens: int) -> Run:
    """Generate `num_tokens` tokens of each prompt, and time the steps after all are computed."""
    engine = llm.engine
    params = SamplingParams(
        temperature=0.0,
        max_tokens=num_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    llm.reset_prefix_cache()
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params)
    groups = list(engine.requests.by_id.values())
    while not all(group.completions[0].generated for group in groups):
        engine.step()
    counters = engine.counters
    tokens, steps, begin = counters.generated_tokens, counters.steps, time.perf_counter()
    while engine.has_unfinished():
        engine.step()
    return Run(
        [group.completions[0].generated for group in groups],
        time.perf_counter() - begin,
        counters.generated_tokens - tokens,
        counters.steps - steps,
    )


def measure(
    plain: LLM, drafting: LLM, task: str, batch: int, num_tokens: int, *, exactly: bool
) -> Row:
    """Compare the tokens of both, then time both.

    Raises:
        SpectralPagedError: tokens differ, though they are to be the same `exactly`.
    """
    prompts = prompts_of(task, batch)
    want, got = (decode(llm, prompts, num_tokens).outputs for llm in (plain, drafting))
    same = sum(a == b for a, b in zip(want, got, strict=True))
    if exactly and same < batch:
        raise SpectralPagedError(
            f"{batch - same} of {batch} outputs of {task} differ with drafts: in fp32 they must not"
        )
    without = decode(plain, prompts, num_tokens)
    before = drafting.stats()
    found = decode(drafting, prompts, num_tokens)
    after = drafting.stats()
    drafted, accepted = (
        int(str(after[name])) - int(str(before[name]))
        for name in ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
    )
    speeds = found.num_tokens / found.seconds, without.num_tokens / without.seconds
    return Row(
        task,
        batch,
        *speeds,
        gain=speeds[0] / speeds[1],
        tokens_per_step=found.num_tokens / found.num_steps / batch,
        acceptance=accepted / drafted if drafted else None,
        same=same,
    )


def line(row: Row) -> list[str]:
    """The cells of a row on the terminal."""
    share = "-" if row.acceptance is None else f"{row.acceptance:.0%}"
    return [
        row.task,
        str(row.batch),
        f"{row.plain_tokens_per_second:.1f}",
        f"{row.tokens_per_second:.1f}",
        f"{row.gain:.2f}x",
        f"{row.tokens_per_step:.2f}",
        share,
        f"{row.same}/{row.batch}",
    ]


HEADING = [
    "task",
    "batch",
    "tokens/s",
    "with drafts",
    "gain",
    "tokens a step",
    "accepted",
    "same",
]


def both(
    loaded: LoadedModel, kv_format: str, config: SpeculativeConfig, options: dict[str, Any]
) -> tuple[LLM, LLM]:
    """An LLM without drafts and one with, over one model."""
    made = [
        engine_of(loaded, kv_format, options | {"speculative_config": speculation})
        for speculation in (None, config)
    ]
    return made[0], made[1]


def main(
    *,
    model: str,
    kv_format: str,
    device: str,
    dtype: str,
    tasks: Sequence[str],
    batches: Sequence[int],
    num_tokens: int,
    speculative_config: str,
    kv_cache_bytes: int | None,
    name: str,
    output_dir: Path,
) -> int:
    """Measure on this machine, print a table and write `speculation-<model>.json`.

    Raises:
        SpectralPagedError: the model cannot be loaded, an option is wrong, or tokens differ.
    """
    config = SpeculativeConfig.read(speculative_config)
    assert config is not None, "the command has a default"
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    loaded = load_model(model, device=where, dtype=kind)
    options = {
        "kv_cache_bytes": kv_cache_bytes or 1 << 30,  # each of two has its own
        "max_num_seqs": max(batches),
    }
    plain, drafting = both(loaded, kv_format, config, options)
    for llm in (plain, drafting):
        llm.warm_up(num_tokens=2048)
    exactly = kind == torch.float32
    rows = []
    for task, batch in product(tasks, batches):
        rows.append(measure(plain, drafting, task, batch, num_tokens, exactly=exactly))
        print(" ".join(line(rows[-1])), flush=True)
    for llm in (plain, drafting):
        llm.close()
    forget(where)
    result = {
        "environment": environment() | {"device": str(where)},
        "model": model_label(model),
        "kv_format": kv_format,
        "dtype": str(kind).removeprefix("torch."),
        "num_tokens": num_tokens,
        "speculative_config": asdict(config),
        "rows": [asdict(row) for row in rows],
    }
    print(table([HEADING, *map(line, rows)]))
    path = write_result(output_dir, f"speculation-{name or file_stem(model)}", result)
    print(f"raw results: {path}")
    return 0
