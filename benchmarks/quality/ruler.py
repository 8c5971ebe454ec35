"""RULER's tasks judged through pages that are sealed before the question, scored as RULER does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spectral_paged.benchmarks.quality.journal import BASELINE, Journal, Record, digest
from spectral_paged.benchmarks.quality.judge import Progress, about, exact_context, method_key
from spectral_paged.benchmarks.quality.methods import Method
from spectral_paged.benchmarks.quality.replay import Context, Replay
from spectral_paged.benchmarks.quality.ruler_tasks import KINDS, RulerTask, ruler_task
from spectral_paged.benchmarks.quality.tasks import Haystack
from spectral_paged.errors import InvalidRequestError

SAID = 160  # characters of an answer that are kept


def answered(
    replay: Replay, context: Context, task: RulerTask, kind: str, hay: Haystack
) -> list[dict[str, Any]]:
    """Score and text of every question of `task` over `context`, generated as one batch."""
    prompts = [hay.encode(q.prompt) for q in task.questions]
    stop = getattr(hay.tokenizer, "eos_token_id", None)
    outputs = replay.generate(context, prompts, max_tokens=KINDS[kind].max_tokens, eos=stop)
    texts = [str(hay.tokenizer.decode(ids)) for ids in outputs]
    return [
        {"score": KINDS[kind].score(text, question.answers), "said": text[:SAID]}
        for question, text in zip(task.questions, texts, strict=True)
    ]


def judge_ruler(
    replay: Replay,
    methods: Sequence[Method],
    hay: Haystack,
    lengths: Sequence[int],
    *,
    journal: Journal,
    samples: int,
    kinds: Sequence[str] = tuple(KINDS),
    seed: int = 0,
    progress: Progress = print,
) -> list[str]:
    """Judge `samples` tasks of every kind and length under every method.

    Methods are asked all questions, those that the exact cache fails among them, as RULER does.
    Returns why tasks were left out, a text for each kind and length that has none.
    """
    left_out = []
    for length in lengths:
        for kind in kinds:
            for sample in range(samples):
                try:
                    task = ruler_task(kind, hay, length, sample, seed)
                except InvalidRequestError as error:
                    left_out.append(str(error))
                    break
                judge_task(replay, methods, task, kind, length, hay, journal)
                progress(f"ruler {kind} at {length}, {sample + 1}/{samples}")
    return left_out


def judge_task(
    replay: Replay,
    methods: Sequence[Method],
    task: RulerTask,
    kind: str,
    length: int,
    hay: Haystack,
    journal: Journal,
) -> list[Record]:
    """Judge one task under every method; records found in the journal are not computed again."""
    ids = [*hay.prefix, *hay.encode(task.context)]
    unit = digest("ruler", kind, ids, [(q.prompt, q.answers) for q in task.questions])
    found = [journal.find(unit, name) for name in (BASELINE, *map(method_key, methods))]
    if all(found):
        return [r for r in found if r is not None]
    head = {"task": "ruler", "kind": kind, "length": length, "context_tokens": len(ids)}
    context = exact_context(replay, ids, methods)
    if (base := found[0]) is None:
        result = answered(replay, context, task, kind, hay)
        base = journal.write(unit, BASELINE, {**head, "method": BASELINE, "result": result})
    records = [base]
    for method in methods:
        name = method_key(method)
        if (record := journal.find(unit, name)) is None:
            sealed = replay.seal(context, method)
            result = answered(replay, sealed, task, kind, hay)
            del sealed
            described = {**head, **about(method, replay.geometry.head_dim)}
            record = journal.write(unit, name, {**described, "result": result})
        records.append(record)
    return records
