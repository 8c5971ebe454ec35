"""Tasks for a compressed cache: continuations of real text, needles, small exact tasks.

Every question comes after the context and is unknown when its pages are sealed. Facts lie in the
part that is sealed under the default rule (64 landmarks, 64 hot tokens). Answers are greedy
completions of raw text, without a chat template, so base models can be judged too.
Needles in a haystack: G. Kamradt, 2023; several at once and exact checking as in RULER
(Hsieh et al., arXiv:2404.06654).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectral_paged.benchmarks.quality.methods import HOT, LANDMARKS
from spectral_paged.benchmarks.quality.texts import Text, by_genre
from spectral_paged.benchmarks.quality.words import (
    CITIES,
    FRUITS,
    NAMES,
    NOUNS,
    SENTENCES,
    STYLES,
    TRADES,
    VERBS,
    WORDS,
)
from spectral_paged.errors import InvalidRequestError
from spectral_paged.kernels.page.layout import BLOCK_TOKENS

WINDOW_SLACK = 128  # tokens before a genre's first window, for methods with more exact tokens
QUESTION_ROOM = 96  # tokens for a question and its answer, kept free below the model's limit
BREAK_SEARCH = 48  # most tokens searched backwards for the end of a sentence to put a fact after


@dataclass(frozen=True, slots=True)
class Window:
    """A context and the text that follows it."""

    genre: str
    length: int  # nominal; the context has `len(context)` tokens
    start: int  # index in the tokens of the genre
    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement to hide, and the prompt and answer that ask for it."""

    kind: str
    statement: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """One question over a context; its fact lies at tokens `start` to `end`."""

    kind: str
    depth: float  # intended place of the fact, 0 to 1 of the sealed part
    start: int
    end: int
    prompt: tuple[int, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Probe:
    """A context with facts in it; `family` is `needle-1`, `needle-8` or `task`."""

    family: str
    name: str
    genre: str
    length: int
    context: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(slots=True)
class Haystack:
    """Texts as tokens, genre by genre, tokenized once."""

    texts: Sequence[Text]
    tokenizer: Any
    max_tokens: int  # most tokens of context and question that the model takes
    _ids: dict[str, list[int]] = field(default_factory=dict)

    @property
    def genres(self) -> list[str]:
        return list(by_genre(self.texts))

    @property
    def prefix(self) -> list[int]:
        """The tokens that the tokenizer puts before every text, often one."""
        return list(self.tokenizer("")["input_ids"])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids(self, genre: str) -> list[int]:
        if genre not in self._ids:
            texts = by_genre(self.texts)[genre]
            self._ids[genre] = self.encode("\n\n".join(t.text.strip() for t in texts))
        return self._ids[genre]

    def sealed_length(self, length: int) -> int:
        """Tokens of a context of nominally `length`: landmarks, whole blocks and hot tokens.

        Raises:
            InvalidRequestError: `length` is below a block, or above the model's limit.
        """
        blocks = length // BLOCK_TOKENS
        if length > self.max_tokens or not blocks:
            raise InvalidRequestError(
                f"contexts of {length} tokens cannot be judged: a block has {BLOCK_TOKENS} tokens "
                f"and the model's limit is {self.max_tokens}"
            )
        if blocks * BLOCK_TOKENS + LANDMARKS + HOT + QUESTION_ROOM > self.max_tokens:
            blocks -= 1
        return blocks * BLOCK_TOKENS + LANDMARKS + HOT

    def holds(self, genre: str, num_tokens: int) -> bool:
        return len(self.ids(genre)) >= num_tokens

    def ends_sentence(self, token: int) -> bool:
        text = str(self.tokenizer.decode([token]))
        return "\n" in text or text.rstrip().endswith((".", "!", "?"))


def continuation_windows(
    hay: Haystack, length: int, count: int = 16, num_continuation: int = 256
) -> list[Window]:
    """`count` windows over the genres in turn, spread evenly over each genre's tokens.

    A continuation has `num_continuation` tokens to judge and one more, the last target. Genres too
    short for one window are left out.

    Raises:
        InvalidRequestError: all genres are too short.
    """
    num_context = hay.sealed_length(length)
    num_context = min(num_context, hay.max_tokens - num_continuation - 1)
    body = num_context - len(hay.prefix)
    needed = WINDOW_SLACK + body + num_continuation + 1
    genres = [g for g in hay.genres if hay.holds(g, needed)]
    if not genres:
        raise InvalidRequestError(f"no text has {needed} tokens; name one")
    windows = []
    for i, genre in enumerate(genres):
        num = len(range(i, count, len(genres)))
        ids = hay.ids(genre)
        room = len(ids) - needed
        for j in range(num):
            start = WINDOW_SLACK + (room * j // (num - 1) if num > 1 else room // 2)
            context = hay.prefix + ids[start : start + body]
            after = ids[start + body : start + body + num_continuation + 1]
            windows.append(Window(genre, length, start, tuple(context), tuple(after)))
    return windows


def plant(
    hay: Haystack, genre: str, length: int, facts: Sequence[tuple[float, Fact]], start: int
) -> tuple[list[int], list[Question]]:
    """A context of real text with `facts` at their depths, and the questions about them.

    Depth 0 is just behind the landmarks, 1 just before the hot tokens. A fact follows the nearest
    end of a sentence before its place. `start` is the first token of the genre's text (cyclic).
    """
    total = hay.sealed_length(length)
    ordered = sorted(facts, key=lambda pair: pair[0])
    pieces = [(depth, fact, hay.encode(f"\n{fact.statement}\n")) for depth, fact in ordered]
    ids = hay.ids(genre)
    budget = total - len(hay.prefix) - sum(len(p) for _, _, p in pieces)
    text = [ids[(start + i) % len(ids)] for i in range(budget)]
    context, used, questions = list(hay.prefix), 0, []
    low, high = LANDMARKS + 1, total - HOT
    for n, (depth, fact, piece) in enumerate(pieces):
        room = sum(len(p) for _, _, p in pieces[n:])  # this fact and those behind it
        place = min(low + int(depth * (high - low)), high - room)
        cut = used + max(0, place - len(context))
        earliest = max(used, cut - BREAK_SEARCH, used + low - len(context))
        for i in range(cut, earliest, -1):
            if hay.ends_sentence(text[i - 1]):
                cut = i
                break
        context += text[used:cut]
        used = cut
        begin = len(context)
        context += piece
        prompt = tuple(hay.encode(f"\n\n{fact.prompt}"))
        questions.append(Question(fact.kind, depth, begin, len(context), prompt, fact.answer))
    return context + text[used:], questions


def needle_facts(style: str, count: int, rng: random.Random) -> list[Fact]:
    """`count` needles of one style with different keys and different answers.

    `mixed` needles differ in their sentence, `code` and `passphrase` ones only in their key, which
    is much harder: a model of 135M parameters recalls 31 of 32 `mixed` ones at 2K, and half of
    the others.
    """
    words = rng.sample(WORDS, len(WORDS))
    names, cities = rng.sample(NAMES, len(NAMES)), rng.sample(CITIES, len(CITIES))
    numbers = [str(n) for n in rng.sample(range(10**6, 10**7), count)]
    if style == "mixed":
        chosen = rng.sample(SENTENCES, count)
    else:
        chosen = [{"code": SENTENCES[0], "passphrase": SENTENCES[3]}[style]] * count
    facts = []
    for sentence in chosen:
        key = {"city": cities.pop, "name": names.pop, "word": words.pop}
        start, value = sentence
        prompt = start.format_map({k: pop() for k, pop in key.items() if f"{{{k}}}" in start})
        if value == "number":
            answer = numbers.pop()
        elif value == "words":
            answer = " ".join(rng.sample(WORDS, 3))
        else:
            answer = rng.choice({"fruit": FRUITS, "city": CITIES}[value])
        facts.append(Fact(style, f"{prompt} {answer}.", prompt, answer))
    return facts


def needle_probes(
    hay: Haystack,
    lengths: Sequence[int],
    round: int,
    num_depths: int = 8,
    seed: int = 0,
    *,
    styles: Sequence[str] = STYLES,
    family: str = "needle",
) -> Iterator[Probe]:
    """The needle probes of one round, two contexts a length, of families like `needle-8`.

    One context has a needle at every depth, the other a single needle, whose depth changes with the
    round. Style and genre change with the round too.
    """
    style = styles[round % len(styles)]
    genre = hay.genres[(round + round // len(styles)) % len(hay.genres)]
    for i, length in enumerate(lengths):
        rng = random.Random(f"{seed}/{length}/{round}")
        depths = [(d + 0.5) / num_depths for d in range(num_depths)]
        single = depths[(5 * round + i) % num_depths]
        groups = {f"{family}-{num_depths}": depths, f"{family}-1": [single]}
        for name_of_family, at in groups.items():
            facts = list(zip(at, needle_facts(style, len(at), rng), strict=True))
            context, questions = plant(hay, genre, length, facts, rng.randrange(10**6))
            name = f"{style} {length} round {round}"
            facts_of = (tuple(context), tuple(questions))
            yield Probe(name_of_family, name, genre, length, *facts_of)


def qa_facts(rng: random.Random) -> list[tuple[float, Fact]]:
    """Three facts for questions: at the beginning, in the middle and at the end."""
    names, cities = rng.sample(NAMES, 4), rng.sample(CITIES, 2)
    choices = [
        ("Where did {0} the {3} open a workshop?", "{0} the {3} opened a workshop in", cities[0]),
        ("Who built the bridge at {2}?", "The bridge at {2} was built by", names[1]),
        ("What was the name of the dog?", "The name of the dog was", names[2]),
        ("What did the captain like best?", "The captain liked best a cake with", None),
    ]
    facts = []
    depths = {"beginning": 0.02, "middle": 0.5, "end": 0.98}
    places = zip(depths.items(), rng.sample(choices, 3), strict=True)
    for (where, depth), (question, start, answer) in places:
        words = (names[0], names[3], cities[1], rng.choice(TRADES))
        question, start = question.format(*words), start.format(*words)
        answer = answer or rng.choice(FRUITS)
        prompt = f"Question: {question}\nAnswer: {start}"
        facts.append((depth, Fact(f"qa-{where}", f"{start} {answer}.", prompt, answer)))
    return facts


def signature_facts(rng: random.Random) -> list[tuple[float, Fact]]:
    """Function definitions whose parameters must be recalled exactly.

    The prompt ends before the bracket, because some tokenizers join it with the letters behind it.
    """
    names = rng.sample([f"{v}_{n}" for v in VERBS for n in NOUNS], 4)
    words = rng.sample(WORDS, 3 * len(names))
    facts = []
    for i, name in enumerate(names):
        first, second, third = words[3 * i : 3 * i + 3]
        parameters = f"{first}, {second}={rng.randrange(2, 99)}, {third}=None"
        body = f"def {name}({parameters}):\n    return {first}\n"
        facts.append(((i + 0.5) / 4, Fact("signature", body, f"def {name}", f"({parameters})")))
    return facts


def step_facts(rng: random.Random) -> list[tuple[float, Fact]]:
    """Intermediate results of five steps, to be recalled by name."""
    facts = []
    for i, name in enumerate(rng.sample(NOUNS, 5)):
        line, value = f"Step {i + 1} result: {name} =", str(rng.randrange(10_000, 100_000))
        facts.append(((i + 0.5) / 5, Fact("step", f"{line} {value}.", f"Recall: {line}", value)))
    return facts


def summary_facts(rng: random.Random) -> list[tuple[float, Fact]]:
    """A fact sheet in one place, asked for line by line as in a summary."""
    company = f"{rng.choice(NOUNS).title()} {rng.choice(WORDS).title()}"
    founder, head = rng.sample(NAMES, 2)
    seat, branch = rng.sample(CITIES, 2)
    lines = [
        (f"{company} was founded in", str(rng.randrange(1850, 2000))),
        (f"The founder of {company} was", founder),
        (f"The head office of {company} is in", seat),
        (f"The second office of {company} is in", branch),
        (f"The director of {company} is", head),
    ]
    depth = rng.uniform(0.1, 0.9)
    return [
        (depth, Fact("summary", f"{line} {answer}.", f"Summary: {line}", answer))
        for line, answer in lines
    ]


TASKS = {  # name -> (facts, genres it reads best in)
    "qa": (qa_facts, ("fiction", "legal")),
    "signature": (signature_facts, ("code",)),
    "step": (step_facts, ("reference", "code")),
    "summary": (summary_facts, ("legal", "fiction")),
}


def task_probes(
    hay: Haystack, lengths: Sequence[int], round: int, seed: int = 0
) -> Iterator[Probe]:
    """The task probes of one round: every task once at every length."""
    for length in lengths:
        for name, (build, genres) in TASKS.items():
            rng = random.Random(f"{seed}/{name}/{length}/{round}")
            here = [g for g in genres if g in hay.genres] or hay.genres
            genre = here[round % len(here)]
            context, questions = plant(hay, genre, length, build(rng), rng.randrange(10**6))
            title = f"{name} {length} round {round}"
            yield Probe("task", title, genre, length, tuple(context), tuple(questions))


def generation_prompts(
    hay: Haystack, lengths: Sequence[int] = (500, 1500, 3000), per_length: int = 2
) -> Iterator[Window]:
    """Prompts of exactly `length` tokens for free generation, genres in turn."""
    for i, length in enumerate(lengths):
        for j in range(per_length):
            genre = hay.genres[(i + j) % len(hay.genres)]
            ids, body = hay.ids(genre), length - len(hay.prefix)
            start = (len(ids) // 3 * (j + 1)) % max(1, len(ids) - body)
            prompt = hay.prefix + ids[start : start + body]
            yield Window(genre, length, start, tuple(prompt), ())
