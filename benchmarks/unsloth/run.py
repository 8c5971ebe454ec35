"""`spectral-paged bench unsloth`: speed of an Unsloth model with and without the cache.

The model has a known shape and random weights, so its text means nothing. Rates come from the time
of a long `generate` less that of a short one. Attention time is GPU time from the profiler: kernels
of a one-token step after the prompt, less those after a prompt of 64 tokens.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import file_stem, write_result
from spectral_paged.benchmarks.throughput.random_models import load_random
from spectral_paged.conformance.inputs import random_calibration
from spectral_paged.errors import missing_extra
from spectral_paged.integrations.unsloth.checkpoints import load_fast, save_checkpoint
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import PageFormat

CASES = ((1, 2462), (16, 8192))  # rows, prompt tokens
UNPATCHED = "unpatched"  # in place of a format: the model as Unsloth runs it
FORMATS = (UNPATCHED, "exact", "spectral-int8", "spectral-quality")
SHORT_CONTEXT = 64  # tokens of a prompt whose step stands for one without attention
SHORT, LONG = 8, 136  # new tokens of two generations, whose difference is timed
PROFILED_STEPS = 8


@dataclass(frozen=True, slots=True)
class Row:
    """The measurement of one format at one size."""

    num_rows: int
    prompt_tokens: int
    format: str
    prompt_seconds: float
    decode_tokens_per_second: float
    kernel_ms_per_step: float | None
    attention_ms_per_step: float | None
    bytes_per_token: float | None
    first_tokens: list[int]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _prompt(model: Any, num_rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (num_rows, length), generator=generator)
    ids = ids.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _generate(model: Any, inputs: dict[str, Tensor], new_tokens: int) -> tuple[float, Tensor]:
    """Generate; returns the seconds, and the new tokens `[B, new_tokens]`."""
    start = _clock(model.device)
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return _clock(model.device) - start, out[:, inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def _kernel_ms(model: Any, inputs: dict[str, Tensor]) -> float | None:
    """Milliseconds of GPU kernels in a one-token step after the prompt; None on a CPU."""
    if model.device.type != "cuda":
        return None
    ids, mask = inputs.values()
    positions = mask.cumsum(-1) - 1
    call: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, "return_dict": True}
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **call)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    total = 0.0
    for step in range(2 + PROFILED_STEPS):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        call |= {"attention_mask": mask, "position_ids": positions[:, -1:] + 1 + step}
        call["past_key_values"] = out.past_key_values
        ids = out.logits[:, -1:].argmax(-1)
        if step < 2:
            out = model(input_ids=ids, **call)
            continue
        with torch.profiler.profile(activities=activities) as profile:
            out = model(input_ids=ids, **call)
            torch.cuda.synchronize()
        total += sum(event.self_device_time_total for event in profile.key_averages())
    return total / 1000 / PROFILED_STEPS


def measure(
    model: Any,
    format: str,
    num_rows: int,
    length: int,
    *,
    short: int = SHORT,
    long: int = LONG,
    **options: Any,
) -> Row:
    """Time `model`, patched with `format` or not, on `num_rows` prompts of `length` tokens."""
    from spectral_paged.integrations.unsloth import patch_unsloth_attention

    inputs = _prompt(model, num_rows, length)
    patch = None
    if format != UNPATCHED:
        patch = patch_unsloth_attention(
            model,
            kv_format=format,
            max_num_seqs=num_rows,
            max_model_len=length + long + 1,
            verbose=False,
            **options,
        )
    try:
        _generate(model, inputs, short)  # compiles and loads kernels
        first, _ = _generate(model, inputs, 1)
        brief, _ = _generate(model, inputs, short)
        whole, tokens = _generate(model, inputs, long)
        kernels = _kernel_ms(model, inputs)
        base = _kernel_ms(model, _prompt(model, num_rows, SHORT_CONTEXT))
        figure = patch.stats()["bytes_per_token"] if patch is not None else None
    finally:
        if patch is not None:
            patch.undo()
    return Row(
        num_rows,
        length,
        format,
        prompt_seconds=first,
        decode_tokens_per_second=num_rows * (long - short) / (whole - brief),
        kernel_ms_per_step=kernels,
        attention_ms_per_step=None if kernels is None or base is None else kernels - base,
        bytes_per_token=figure if isinstance(figure, float) else None,
        first_tokens=tokens[0, :8].tolist(),
    )


def write(rows: Sequence[Row], model: str, *, enforce_eager: bool, output_dir: Path) -> Path:
    """Write `unsloth-<model>.json` of the rows so far; returns its path."""
    versions = {name: importlib.import_module(name).__version__ for name in ("unsloth", "triton")}
    result = {
        "environment": environment() | versions | {"device": "cuda"},
        "model": f"{model} (random weights), bf16",
        "enforce_eager": enforce_eager,
        "rows": [asdict(row) for row in rows],
    }
    return write_result(output_dir, f"unsloth-{file_stem(model)}", result)


def main(*, model: str, formats: Sequence[str], enforce_eager: bool, output_dir: Path) -> int:
    """Measure on this machine's GPU, print a table and write `unsloth-<model>.json`."""
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_random(model, device=device, dtype=torch.bfloat16)
        geometry = loaded.geometry
        save_checkpoint(loaded.model, Path(folder))
        del loaded
        torch.cuda.empty_cache()
        fast = load_fast(
            Path(folder), dtype=torch.bfloat16, max_seq_length=16384, device=str(device)
        )
    rows = []
    for num_rows, length in CASES:
        for format in formats or FORMATS:
            options: dict[str, Any] = {"enforce_eager": enforce_eager}
            if format != UNPATCHED:
                pages = PageFormat.preset(
                    format, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim
                )
                options["calibration"] = random_calibration(
                    pages, LoadedModel(model, fast, None, geometry)
                )
            rows.append(measure(fast, format, num_rows, length, **options))
            # written after each row, so that an error loses nothing
            path = write(rows, model, enforce_eager=enforce_eager, output_dir=output_dir)
            torch.cuda.empty_cache()
            row = rows[-1]
            print(
                f"{num_rows:3} x {length:5}  {format:14} prompt {row.prompt_seconds:7.3f} s  "
                f"{row.decode_tokens_per_second:8.1f} tokens/s  GPU {row.kernel_ms_per_step:7.3f} "
                f"ms a step, attention {row.attention_ms_per_step:7.3f} ms",
                flush=True,
            )
    print(f"raw results: {path}")
    return 0


def run_apart(module: str, arguments: dict[str, Any]) -> int:
    """Run `main(**arguments)` of a module in a new process, which imports Unsloth first.

    Unsloth must be imported before transformers. `output_dir` becomes a path again. The exit code
    is that of the command line: 2 for a typed error, which is printed as one line.

    Raises:
        MissingPackageError: unsloth is not installed.
    """
    if importlib.util.find_spec("unsloth") is None:
        raise missing_extra("bench unsloth needs the package unsloth", "unsloth")
    code = (
        "import unsloth, sys, json; from importlib import import_module; from pathlib import Path\n"
        "from spectral_paged.errors import SpectralPagedError\n"
        "arguments = json.loads(sys.argv[2])\n"
        "arguments['output_dir'] = Path(arguments['output_dir'])\n"
        "try:\n"
        "    sys.exit(import_module(sys.argv[1]).main(**arguments))\n"
        "except (SpectralPagedError, OSError) as error:\n"
        "    print(f'spectral-paged: {error}', file=sys.stderr)\n"
        "    sys.exit(2)"
    )
    command = [sys.executable, "-P", "-c", code, module, json.dumps(arguments, default=str)]
    return subprocess.run(command, check=False).returncode
