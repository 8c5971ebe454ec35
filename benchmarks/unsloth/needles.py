"""`spectral-paged bench unsloth --needles`: needles that an Unsloth model recalls, by format.

Weights and text are real; facts and questions are those of `bench quality`. The unpatched model
gets all questions about a context in one left-padded batch. A patched one gets context and question
in two turns, a question at a time. A context has a length at which all of its blocks are pages when
its turn ends, so no fact lies in exact tokens when the question is read.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_paged.benchmarks.quality.judge import is_answer
from spectral_paged.benchmarks.quality.tasks import Haystack, Probe, needle_probes
from spectral_paged.benchmarks.quality.texts import judged_texts
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import file_stem, model_label, write_result
from spectral_paged.benchmarks.unsloth.run import UNPATCHED
from spectral_paged.device import choose_dtype
from spectral_paged.integrations.padded_rows import left_padded
from spectral_paged.integrations.unsloth.checkpoints import load_fast
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.models.loader import load_model
from spectral_paged.pages import PageFormat

ANSWER_TOKENS = 12
MAX_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class Recall:
    """The numbers of needles that one format recalls.

    known, recalled_of_known: needles that the unpatched model recalls, and those of them that the
        format recalls too.
    same_tokens: answers that are token for token those of the unpatched model.
    """

    format: str
    asked: int
    recalled: int
    known: int
    recalled_of_known: int
    same_tokens: int
    pages_attended: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens with which a model answered a question; `right` if they are the answer."""

    token_ids: list[int]
    right: bool


GREEDY: dict[str, Any] = {
    "max_new_tokens": ANSWER_TOKENS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _said_at_once(model: Any, probe: Probe) -> list[list[int]]:
    """The tokens of the answer to each question, all in one left-padded batch."""
    rows = [[*probe.context, *question.prompt] for question in probe.questions]
    inputs = left_padded(rows, model.device)
    out = model.generate(**inputs, **GREEDY)
    said: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
    return said


def _said_in_turns(model: Any, probe: Probe) -> list[list[int]]:
    """The tokens of the answer to each question, asked once its context is stored and sealed."""
    context = torch.tensor([probe.context], device=model.device)
    said = []
    for question in probe.questions:
        past = model(
            input_ids=context,
            attention_mask=torch.ones_like(context),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        prompt = torch.tensor([question.prompt], device=model.device)
        ids = torch.cat((context, prompt), dim=1)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=past, **GREEDY
        )
        said.append(out[0, ids.shape[1] :].tolist())
    return said


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, probe: Probe, *, in_turns: bool) -> list[Answer]:
    """The model's answers to every question of a probe."""
    said = (_said_in_turns if in_turns else _said_at_once)(model, probe)
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    return [
        Answer(tokens, is_answer(text, question.answer))
        for tokens, text, question in zip(said, texts, probe.questions, strict=True)
    ]


def ask(
    model: Any, tokenizer: Any, probes: Sequence[Probe], format: str, **options: Any
) -> tuple[list[Answer], int]:
    """Answers to all questions, patched with `format` or unpatched, and the number of pages read.

    Args:
        options: further arguments of `patch_unsloth_attention`.

    Raises:
        ArithmeticError: the format has pages, and none was read.
    """
    from spectral_paged.integrations.unsloth import patch_unsloth_attention

    patch, attended = None, 0
    if format != UNPATCHED:
        patch = patch_unsloth_attention(
            model, kv_format=format, max_num_seqs=2, verbose=False, **options
        )
    try:
        found = [
            answer
            for probe in probes
            for answer in answers(model, tokenizer, probe, in_turns=patch is not None)
        ]
        if patch is not None:
            stats: dict[str, Any] = patch.stats()
            attended = stats["pages_attended"]
    finally:
        if patch is not None:
            patch.undo()
    if format not in (UNPATCHED, "exact") and not attended:
        raise ArithmeticError(f"{format}: no page was read")
    return found, attended


def recall(format: str, found: Sequence[Answer], own: Sequence[Answer], attended: int) -> Recall:
    """Compare the answers `found` of a format with the unpatched model's `own`."""
    pairs = list(zip(found, own, strict=True))
    return Recall(
        format,
        asked=len(found),
        recalled=sum(a.right for a in found),
        known=sum(b.right for b in own),
        recalled_of_known=sum(a.right and b.right for a, b in pairs),
        same_tokens=sum(a.token_ids == b.token_ids for a, b in pairs),
        pages_attended=attended,
    )


def probes_of(hay: Haystack, lengths: Sequence[int], count: int) -> list[Probe]:
    """Rounds of `needle_probes` with at least `count` needles, at most `MAX_ROUNDS` of them."""
    probes: list[Probe] = []
    for round in range(MAX_ROUNDS):
        probes += needle_probes(hay, lengths, round)
        if sum(len(probe.questions) for probe in probes) >= count:
            break
    return probes


def main(
    *,
    model: str,
    formats: Sequence[str],
    count: int,
    lengths: Sequence[int],
    dtype: str,
    output_dir: Path,
    **options: Any,
) -> int:
    """Ask the unpatched model and every format for `count` needles or a few more, on this GPU.

    Prints a line each and writes `unsloth-needles-<model>.json`.

    Args:
        model: alias, folder or GGUF file.
        formats: presets; `unpatched` may be among them, and is asked once.
        lengths: tokens of a context.
        options: further arguments of `patch_unsloth_attention`.

    Raises:
        FormatError: an unknown preset.
        InvalidRequestError: a length that the model does not take.
    """
    formats = [name for name in formats if name != UNPATCHED]
    where = torch.device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(model, device=where, dtype=choose_dtype(dtype, where))
        tokenizer, geometry = loaded.tokenizer, loaded.geometry
        for name in formats:  # an unknown preset is refused before any work
            PageFormat.preset(name, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim)
        loaded.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del loaded
        fast = load_fast(
            Path(folder),
            dtype=choose_dtype(dtype, where),
            max_seq_length=max(lengths) + BLOCK_TOKENS,
            device=str(where),
        )
    hay = Haystack(judged_texts(), tokenizer, geometry.max_position_embeddings)
    probes = probes_of(hay, lengths, count)
    own, _ = ask(fast, tokenizer, probes, UNPATCHED)
    rows = [recall(UNPATCHED, own, own, 0)]
    for format in formats:
        found, attended = ask(fast, tokenizer, probes, format, **options)
        rows.append(recall(format, found, own, attended))
    for row in rows:
        print(
            f"{row.format:18} {row.recalled} of {row.asked} needles, {row.recalled_of_known} of "
            f"the {row.known} that {UNPATCHED} recalls, {row.same_tokens} answers token for token, "
            f"{row.pages_attended} pages read",
        )
    result = {
        "environment": environment() | {"device": where.type, "dtype": str(fast.dtype)},
        "unsloth": importlib.import_module("unsloth").__version__,
        "model": model_label(model),
        "lengths": list(lengths),
        "rows": [asdict(row) for row in rows],
    }
    path = write_result(output_dir, f"unsloth-needles-{file_stem(model)}", result)
    print(f"raw results: {path}")
    return 0
