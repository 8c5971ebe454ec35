"""Page formats and their peers judged on a replay: divergence, needles, tasks, free generation.

A unit of work is one context under all methods. The context is prefilled once and the model
answers over it exactly once (`journal.BASELINE`); then each method seals it and answers again.
Every result goes to the journal at once. `judge_*` return summaries of what they ran, as plain
values that go to JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch

from spectral_paged.benchmarks.quality.divergence import divergence, target_nll
from spectral_paged.benchmarks.quality.journal import BASELINE, Journal, Record, digest
from spectral_paged.benchmarks.quality.methods import HOT, Method, WantsQueries
from spectral_paged.benchmarks.quality.replay import Context, Replay
from spectral_paged.benchmarks.quality.summary import (
    continuation_summary,
    generation_summary,
    probe_summary,
)
from spectral_paged.benchmarks.quality.tasks import (
    Haystack,
    Probe,
    Question,
    Window,
    needle_probes,
    task_probes,
)
from spectral_paged.kernels.page.layout import BLOCK_TOKENS

Progress = Callable[[str], None]


def method_key(method: Method) -> str:
    """The journal key of a method: name and fingerprint, or all fields of a dataclass.

    It does not notice a change of code: start a new journal after one.
    """
    told = getattr(method, "fingerprint", None) or (repr(method) if is_dataclass(method) else "")
    return f"{method.name}/{digest(str(told))}"


def about(method: Method, head_dim: int) -> dict[str, Any]:
    """The fields of a record that describe its method; the ratio is against 2 bytes an element."""
    size = float(method.bytes_per_token(head_dim))
    return {
        "method": method.name,
        "family": method.family,
        "landmarks": method.num_landmark_tokens,
        "bytes_per_token": size,
        "ratio": 4 * head_dim / size if size else None,
    }


def num_sealed(num_tokens: int, landmarks: int, hot: int = HOT) -> int:
    """The number of blocks that are pages in a context of `num_tokens`."""
    return max(0, num_tokens - landmarks - hot) // BLOCK_TOKENS


def exact_context(replay: Replay, ids: Sequence[int], methods: Sequence[Method]) -> Context:
    """The exact context of `ids`, with its queries if one of `methods` needs them."""
    wanted = any(isinstance(m, WantsQueries) for m in methods)
    return replay.prefill(list(ids), keep_queries=wanted)


def judge_window(
    replay: Replay,
    methods: Sequence[Method],
    window: Window,
    journal: Journal,
    segment: int | None = None,
    task: str = "continuation",
) -> list[Record]:
    """Judge one window under every method; records found in the journal are not computed again.

    With `segment`, later parts of the context are themselves computed over pages, as in a prefill
    by segments of that many tokens. Without, the whole context is prefilled exactly.
    """
    unit = digest(task, window.context, window.continuation, segment)
    found = [journal.find(unit, name) for name in (BASELINE, *map(method_key, methods))]
    if all(found):
        return [r for r in found if r is not None]
    head_dim = replay.geometry.head_dim
    head = {
        "task": task,
        "genre": window.genre,
        "length": window.length,
        "context_tokens": len(window.context),
        "window": digest(window.context, window.continuation),
        "segment": segment,
    }
    ids = torch.tensor([window.continuation[:-1]], device=replay.model.device)
    targets = torch.tensor(window.continuation[1:], device=replay.model.device)
    context = exact_context(replay, window.context, methods)
    exact = replay.logits(context, ids)[0]
    best = exact.argmax(-1)
    nll = float(target_nll(exact, targets).sum())
    result: dict[str, Any] = {"tokens": len(targets), "nll": nll}
    if (base := found[0]) is None:
        base = journal.write(unit, BASELINE, {**head, "method": BASELINE, "result": result})
    records = [base]
    for method in methods:
        name = method_key(method)
        if (record := journal.find(unit, name)) is None:
            if segment is None:
                sealed = replay.seal(context, method)
            else:
                sealed = replay.prefill_through(list(window.context), method, segment)
            logits = replay.logits(sealed, ids)[0]
            del sealed
            result = {
                "tokens": len(targets),
                "nll": float(target_nll(logits, targets).sum()),
                "agree": int((logits.argmax(-1) == best).sum()),
                "kl": [float(f"{x:.5g}") for x in divergence(exact, logits).tolist()],
                "sealed_blocks": num_sealed(
                    len(window.context), method.num_landmark_tokens, method.hot_tokens
                ),
            }
            described = {**head, **about(method, head_dim)}
            record = journal.write(unit, name, {**described, "result": result})
        records.append(record)
    return records


def judge_continuation(
    replay: Replay,
    methods: Sequence[Method],
    windows: Sequence[Window],
    *,
    journal: Journal,
    segment: int | None = None,
    progress: Progress = print,
) -> dict[str, Any]:
    """Divergence, top-1 agreement and perplexity of every method over `windows`."""
    records: list[Record] = []
    for i, window in enumerate(windows):
        records += judge_window(replay, methods, window, journal, segment)
        rule = f", prefilled by {segment}" if segment else ""
        progress(f"window {i + 1}/{len(windows)}: {window.genre} {window.length}{rule}")
    return continuation_summary(records)


def is_answer(text: str, answer: str) -> bool:
    """True if a completion begins with exactly `answer`, spaces before it aside."""
    text = text.lstrip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def ask(
    replay: Replay, context: Context, questions: Sequence[Question], tokenizer: Any
) -> list[str]:
    """Greedy completions of all questions over one context."""
    longest = max(
        len(tokenizer(f" {q.answer}", add_special_tokens=False)["input_ids"]) for q in questions
    )
    prompts = [list(q.prompt) for q in questions]
    answers = replay.generate(context, prompts, max_tokens=longest + 2)
    return [str(tokenizer.decode(ids)) for ids in answers]


def judge_probe(
    replay: Replay, methods: Sequence[Method], probe: Probe, journal: Journal, tokenizer: Any
) -> list[Record]:
    """Judge one context with facts under every method.

    Methods get only the questions that the exact cache answers."""
    asked = [(q.prompt, q.answer, q.start) for q in probe.questions]
    unit = digest("probe", probe.family, probe.context, asked)
    found = [journal.find(unit, name) for name in (BASELINE, *map(method_key, methods))]
    if all(found):
        return [r for r in found if r is not None]
    head = {
        "task": "probe",
        "probe": probe.family,
        "name": probe.name,
        "genre": probe.genre,
        "length": probe.length,
        "context_tokens": len(probe.context),
    }
    context = exact_context(replay, probe.context, methods)

    def check(
        over: Context, questions: Sequence[Question], landmarks: int, hot: int
    ) -> list[Record]:
        if not questions:
            return []
        end = landmarks + BLOCK_TOKENS * num_sealed(len(probe.context), landmarks, hot)
        texts = ask(replay, over, questions, tokenizer)
        return [
            {
                "index": probe.questions.index(q),
                "kind": q.kind,
                "depth": q.depth,
                "sealed": landmarks <= q.start and q.end <= end,
                "correct": is_answer(text, q.answer),
                "said": text[:80],
            }
            for q, text in zip(questions, texts, strict=True)
        ]

    if (base := found[0]) is None:
        answers = check(context, probe.questions, 0, HOT)
        base = journal.write(unit, BASELINE, {**head, "method": BASELINE, "result": answers})
    recalled = [probe.questions[a["index"]] for a in base["result"] if a["correct"]]
    records = [base]
    for method in methods:
        name = method_key(method)
        if (record := journal.find(unit, name)) is None:
            sealed = replay.seal(context, method) if recalled else context
            answers = check(sealed, recalled, method.num_landmark_tokens, method.hot_tokens)
            del sealed
            described = {**head, **about(method, replay.geometry.head_dim)}
            record = journal.write(unit, name, {**described, "result": answers})
        records.append(record)
    return records


def judge_probes(
    replay: Replay,
    methods: Sequence[Method],
    rounds: Callable[[int], Iterable[Probe]],
    *,
    journal: Journal,
    tokenizer: Any,
    target: int,
    max_rounds: int,
    progress: Progress = print,
) -> dict[str, Any]:
    """Judge rounds of probes until the exact cache has recalled `target` facts, or `max_rounds`."""
    records: list[Record] = []
    recalled = 0
    for round in range(max_rounds):
        for probe in rounds(round):
            new = judge_probe(replay, methods, probe, journal, tokenizer)
            records += new
            recalled += sum(a["correct"] for a in new[0]["result"])
            progress(f"{probe.family} {probe.name} ({probe.genre}): {recalled} recalled so far")
        if recalled >= target:
            break
    summary = probe_summary(records)
    return {**summary, "target": target, "reached": recalled >= target}


def judge_needles(
    replay: Replay,
    methods: Sequence[Method],
    hay: Haystack,
    lengths: Sequence[int],
    *,
    journal: Journal,
    target: int = 64,
    max_rounds: int = 12,
    num_depths: int = 8,
    seed: int = 0,
    progress: Progress = print,
) -> dict[str, Any]:
    """Needle recall of every method by length and depth."""
    return judge_probes(
        replay,
        methods,
        lambda round: needle_probes(hay, lengths, round, num_depths, seed),
        journal=journal,
        tokenizer=hay.tokenizer,
        target=target,
        max_rounds=max_rounds,
        progress=progress,
    )


def judge_tasks(
    replay: Replay,
    methods: Sequence[Method],
    hay: Haystack,
    lengths: Sequence[int],
    *,
    journal: Journal,
    target: int = 64,
    max_rounds: int = 8,
    seed: int = 0,
    progress: Progress = print,
) -> dict[str, Any]:
    """Tasks with exact answers under every method: questions, signatures, results, summaries."""
    return judge_probes(
        replay,
        methods,
        lambda round: task_probes(hay, lengths, round, seed),
        journal=journal,
        tokenizer=hay.tokenizer,
        target=target,
        max_rounds=max_rounds,
        progress=progress,
    )


def generate_sealing(
    replay: Replay, prompt: Sequence[int], method: Method | None, num_tokens: int
) -> list[int]:
    """`num_tokens` greedy tokens; blocks that fall due on the way are sealed.

    When one does, the text so far is prefilled again exactly. So the error is that of the pages
    themselves, without the effect of earlier pages on the keys of generated tokens.
    """
    done: list[int] = []
    while len(done) < num_tokens:
        ids = [*prompt, *done]
        context = exact_context(replay, ids[:-1], [method] if method is not None else [])
        room = num_tokens - len(done)
        if method is not None:
            landmarks, hot = method.num_landmark_tokens, method.hot_tokens
            sealed = num_sealed(len(ids) - 1, landmarks, hot)
            context = replay.seal(context, method)
            due = landmarks + hot + BLOCK_TOKENS * (sealed + 1)
            room = min(room, due - (len(ids) - 1))
        done += replay.generate(context, [ids[-1:]], max_tokens=room)[0]
    return done


def judge_generation(
    replay: Replay,
    methods: Sequence[Method],
    prompts: Iterable[Window],
    *,
    journal: Journal,
    num_tokens: int = 192,
    progress: Progress = print,
) -> dict[str, Any]:
    """Free greedy generation: tokens equal to the exact cache's, and repetition."""
    records: list[Record] = []
    for prompt in prompts:
        unit = digest("generation", prompt.context, num_tokens)
        head = {"task": "generation", "genre": prompt.genre, "length": prompt.length}
        if (base := journal.find(unit, BASELINE)) is None:
            ids = generate_sealing(replay, prompt.context, None, num_tokens)
            base = journal.write(unit, BASELINE, {**head, "method": BASELINE, "result": ids})
        records.append(base)
        for method in methods:
            name = method_key(method)
            if (record := journal.find(unit, name)) is None:
                ids = generate_sealing(replay, prompt.context, method, num_tokens)
                described = {**head, **about(method, replay.geometry.head_dim)}
                record = journal.write(unit, name, {**described, "result": ids})
            records.append(record)
        progress(f"generation after {prompt.length} tokens ({prompt.genre})")
    return generation_summary(records)
