"""What an engine answers, and how it differs from another's answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectral_paged.benchmarks.quality.judge import is_answer
from spectral_paged.benchmarks.quality.summary import mean, standard_error
from spectral_paged.benchmarks.served.requests import Request

TOP = 20  # log-probs asked for, the most that engines give by default


@dataclass(frozen=True, slots=True)
class Answer:
    """The greedy tokens of an answer, and the likeliest ones in place of the first."""

    token_ids: tuple[int, ...]
    logprobs: Mapping[int, float]


@dataclass(slots=True)
class Answers:
    """An engine's answers, one a request, and its figures at the end of the run."""

    backend: str
    found: list[Answer]
    stats: dict[str, Any] = field(default_factory=dict)


def ask(llm: Any, params_type: Any, requests: Sequence[Request]) -> list[Answer]:
    """Ask `llm`, an `LLM` of this package or of vLLM, with its own type of sampling parameters.

    The first request of each context goes first, so that the others find its pages.
    """
    first = {request.context: i for i, request in reversed(list(enumerate(requests)))}
    rest = [i for i in range(len(requests)) if i not in set(first.values())]
    found: dict[int, Answer] = {}
    for turn in (sorted(first.values()), rest):
        prompts = [{"prompt_token_ids": list(requests[i].prompt_token_ids)} for i in turn]
        params = [
            params_type(
                temperature=0.0,
                max_tokens=requests[i].num_answer_tokens,
                ignore_eos=True,
                logprobs=TOP,
            )
            for i in turn
        ]
        if not turn:
            continue
        for i, output in zip(turn, llm.generate(prompts, params, use_tqdm=False), strict=True):
            if getattr(output, "error", None) is not None:
                raise output.error
            [said] = output.outputs
            top = {token: entry.logprob for token, entry in said.logprobs[0].items()}
            found[i] = Answer(tuple(said.token_ids), top)
    return [found[i] for i in range(len(requests))]


def divergence(exact: Mapping[int, float], other: Mapping[int, float]) -> float:
    """KL(exact || other) in nats over the tokens that both name, and all others as one.

    Joining tokens only lowers a divergence (data processing inequality), and little here: what
    neither names has next to no mass.
    """
    named = [token for token in exact if token in other]
    kl = sum(math.exp(exact[t]) * (exact[t] - other[t]) for t in named)
    p, q = (max(1e-12, 1.0 - sum(math.exp(x[t]) for t in named)) for x in (exact, other))
    return kl + p * math.log(p / q)


def compared(
    requests: Sequence[Request], answers: Answers, baseline: Answers, tokenizer: Any
) -> list[dict[str, Any]]:
    """A row a length: needles recalled, and the divergence from `baseline` at places of text."""
    rows = []
    triples = list(zip(requests, answers.found, baseline.found, strict=True))
    for length in dict.fromkeys(request.length for request in requests):
        here = [triple for triple in triples if triple[0].length == length]
        right = [
            is_answer(str(tokenizer.decode(list(one.token_ids))), request.answer)
            for request, one, _ in here
            if request.answer is not None
        ]
        windows: dict[int, list[float]] = {}
        for request, one, other in here:
            if request.answer is None:
                found = divergence(other.logprobs, one.logprobs)
                windows.setdefault(request.context, []).append(found)
        means = [sum(values) / len(values) for values in windows.values()]
        rows.append(
            {
                "backend": answers.backend,
                "length": length,
                "needles": len(right),
                "recalled": sum(right),
                "kl": mean(means),
                "kl_standard_error": standard_error(means),
                "places": sum(map(len, windows.values())),
            }
        )
    return rows
