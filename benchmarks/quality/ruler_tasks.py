"""The thirteen task kinds of RULER, made here at any length.

Hsieh et al., arXiv:2404.06654, with its prompts, settings and numbers of generated tokens. Essays
are the judged texts, and the questions of `qa_1` (one document) and `qa_2` (two) are about made-up
companies and people instead of SQuAD and HotpotQA, so nothing is downloaded. The context ends
before the question, so that pages are sealed without knowing it.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from spectral_paged.benchmarks.quality.tasks import Haystack
from spectral_paged.benchmarks.quality.words import (
    ADJECTIVES,
    CITIES,
    FRUITS,
    NAMES,
    NOUNS,
    TRADES,
    WORDS,
)
from spectral_paged.errors import InvalidRequestError

QUESTIONS = 4  # of one context, where a kind allows for several; each is scored alone
QUESTION_TOKENS = 256  # kept free below the model's limit, for a question and its answer
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
THINGS = tuple(dict.fromkeys(WORDS + NOUNS + FRUITS + TRADES))
COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3  # words of `cwe`, and how often they come
HOPS = 4  # of `vt`: so many variables follow the first
CODE_LETTERS, ZIPF = 6, 2.0  # of `fwe`

Scorer = Callable[[str, Sequence[str]], float]


def match_all(text: str, answers: Sequence[str]) -> float:
    """The share of `answers` that `text` contains, whatever its case."""
    return sum(a.lower() in text.lower() for a in answers) / len(answers)


def match_part(text: str, answers: Sequence[str]) -> float:
    """1.0 if `text` contains any of `answers`, whatever its case, else 0.0."""
    return float(any(a.lower() in text.lower() for a in answers))


@dataclass(frozen=True, slots=True)
class RulerQuestion:
    """A question with the beginning of its answer, and what a right answer contains."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RulerTask:
    """A context of one kind and its questions, as text."""

    context: str
    questions: tuple[RulerQuestion, ...]


@dataclass(frozen=True, slots=True)
class RulerKind:
    """A kind of task: `build(size, hay, rng)` makes one with `size` units of haystack.

    What a unit is depends on the kind: a sentence, a needle, a word, a document.
    """

    build: Callable[[int, Haystack, random.Random], RulerTask]
    max_tokens: int  # most tokens of an answer
    score: Scorer = match_all


# ---- needles in a haystack ---------------------------------------------------------------


def pairs_of_words(count: int, rng: random.Random) -> list[str]:
    """`count` different words like `amber-lantern`."""
    most = len(ADJECTIVES) * len(THINGS)
    if count > most:
        raise InvalidRequestError(f"a task wants {count} keys, and there are {most}: shorten it")
    places = rng.sample(range(most), count)
    return [f"{ADJECTIVES[p // len(THINGS)]}-{THINGS[p % len(THINGS)]}" for p in places]


def values_of(kind: str, count: int, rng: random.Random) -> list[str]:
    """`count` different words, numbers of seven digits, or UUIDs."""
    if kind == "words":
        return pairs_of_words(count, rng)
    if kind == "numbers":
        return [str(n) for n in rng.sample(range(10**6, 10**7), count)]
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


@cache
def sentences(texts: tuple[str, ...]) -> tuple[str, ...]:
    """All sentences of `texts`, in order."""
    parts = re.split(r"(?<=[.!?])\s+", " ".join(texts))
    return tuple(s.strip() for s in parts if s.strip())


def sentences_of(hay: Haystack, count: int, rng: random.Random) -> list[str]:
    """`count` sentences of a judged text from a random one on; at its end it begins again."""
    genre = hay.genres[rng.randrange(len(hay.genres))]
    found = sentences(tuple(t.text for t in hay.texts if t.genre == genre))
    start = rng.randrange(len(found))
    return [found[(start + i) % len(found)] for i in range(count)]


def needles(
    size: int,
    hay: Haystack,
    rng: random.Random,
    *,
    haystack: str = "essay",
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> RulerTask:
    """Needles `One of the special magic numbers for KEY is: VALUE.` among sentences or others."""
    count = max(num_keys, num_queries)
    others = size if haystack == "needles" else 0
    names = values_of(keys, count + others, rng)
    found = values_of(values, count * num_values + others, rng)

    def needle(name: str, value: str) -> str:
        return f"One of the special magic {values} for {name} is: {value}."

    told = {n: found[i * num_values : (i + 1) * num_values] for i, n in enumerate(names[:count])}
    hidden = [needle(name, value) for name, of_name in told.items() for value in of_name]
    if haystack == "needles":
        lines = list(map(needle, names[count:], found[count * num_values :]))
    elif haystack == "noise":
        lines = [NOISE] * size
    else:
        lines = sentences_of(hay, size, rng)
    for line in hidden:
        lines.insert(rng.randrange(len(lines) + 1), line)
    joined = ("\n" if haystack != "essay" else " ").join(lines)
    single = num_values * num_queries == 1
    some, are, kind = ("A", "is", values[:-1]) if single else ("Some", "are", values)
    intro = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards.\n"
    )
    asked = rng.sample(list(told), count)
    groups = [asked] if num_queries > 1 else [[name] for name in asked[:QUESTIONS]]
    questions = []
    for group in groups:
        query = ", ".join(group[:-1]) + ", and " + group[-1] if len(group) > 1 else group[0]
        what = "is the" if single else "are all the"
        prompt = (
            f"\nWhat {what} special magic {kind} for {query} mentioned in the provided text? "
            f"The special magic {kind} for {query} mentioned in the provided text {are}"
        )
        questions.append(RulerQuestion(prompt, tuple(v for name in group for v in told[name])))
    return RulerTask(intro + joined, tuple(questions))


# ---- chains of variables -----------------------------------------------------------------


def chain(size: int, rng: random.Random) -> tuple[str, RulerQuestion]:
    """Lines of noise with `VAR A = 12345`, `VAR B = VAR A` and so on in it, and the question."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        names += [name] if name not in names else []
    value = str(rng.randrange(10_000, 100_000))
    steps = [value, *(f"VAR {name}" for name in names)]
    lines = [NOISE] * size
    places = sorted(rng.randrange(size + 1) for _ in names)
    for i in reversed(range(len(names))):
        lines.insert(places[i], f"VAR {names[i]} = {steps[i]}")
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines)
    )
    prompt = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        f"Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are: "
    )
    return text, RulerQuestion(prompt, tuple(names))


def variable_tracking(size: int, hay: Haystack, rng: random.Random) -> RulerTask:
    """One chain of variables in noise, behind a short example with its answer."""
    example, solved = chain(5, rng)
    text, question = chain(size, rng)
    shown = f"{example}{solved.prompt}{' '.join(solved.answers)}\n\n"
    return RulerTask(shown + text, (question,))


# ---- words that come often ---------------------------------------------------------------


@cache
def vocabulary(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The different words of `texts` of four to ten letters, in order."""
    words = {w.lower() for text in texts for w in re.findall(r"\b[A-Za-z]{4,10}\b", text)}
    return tuple(sorted(words))


def word_list(
    common: Sequence[str], rare: Sequence[str], times: tuple[int, int], rng: random.Random
) -> tuple[str, RulerQuestion]:
    """A numbered list of the words, shuffled, and the question for the common ones."""
    listed = [w for w in common for _ in range(times[0])]
    listed += [w for w in rare for _ in range(times[1])]
    rng.shuffle(listed)
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
        + " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))
    )
    prompt = (
        f"\nQuestion: What are the {len(common)} most common words in the above list? "
        f"Answer: The top {len(common)} words that appear most often in the list are:"
    )
    return text, RulerQuestion(prompt, tuple(common))


def common_words(size: int, hay: Haystack, rng: random.Random) -> RulerTask:
    """Ten words thirty times each among `size` words three times each, behind a short example."""
    known = vocabulary(tuple(t.text for t in hay.texts))
    wanted = COMMON + size
    if wanted + 2 * COMMON > len(known):
        raise InvalidRequestError(
            f"cwe wants {wanted} different words, and the texts have {len(known)}: give more text"
        )
    words = rng.sample(known, wanted + 2 * COMMON)
    example = words[wanted:]
    shown, solved = word_list(example[:COMMON], example[COMMON:], (3, 1), rng)
    solution = " ".join(f"{i + 1}. {w}" for i, w in enumerate(solved.answers))
    text, question = word_list(
        words[:COMMON], words[COMMON:wanted], (COMMON_TIMES, RARE_TIMES), rng
    )
    return RulerTask(f"{shown}{solved.prompt} {solution}\n\n{text}", (question,))


def frequent_words(size: int, hay: Haystack, rng: random.Random) -> RulerTask:
    """Coded words as often as Zipf's law says: dots are the first, the next three are asked."""
    zeta = sum(i**-ZIPF for i in range(1, 10_001))
    counts: list[int] = []
    while not counts or counts[-1] > 0:
        counts.append(round(size * (len(counts) + 1) ** -ZIPF / zeta))
    # the fourth comes less often than the third, however few words there are
    counts = [c for c in counts if c]
    letters = "abcdefghijklmnopqrstuvwxyz"
    codes = ["...."]
    while len(codes) < max(4, len(counts)):
        code = "".join(rng.choices(letters, k=CODE_LETTERS))
        codes += [code] if code not in codes else []
    listed = [code for code, times in zip(codes, counts, strict=False) for _ in range(times)]
    rng.shuffle(listed)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. " + " ".join(listed)
    )
    prompt = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text? Answer: According to the "
        "coded text above, the three most frequently appeared words are:"
    )
    return RulerTask(text, (RulerQuestion(prompt, tuple(codes[1:4])),))


# ---- questions about documents -----------------------------------------------------------

ASKED = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


def people(count: int, rng: random.Random) -> list[str]:
    """`count` different full names."""
    pairs = [f"{a} {b.title()}" for a in NAMES for b in (*ADJECTIVES, *THINGS)]
    if count > len(pairs):
        raise InvalidRequestError(f"a task wants {count} names, and there are {len(pairs)}")
    return rng.sample(pairs, count)


def documents(
    paragraphs: list[str], questions: Sequence[tuple[str, str]], rng: random.Random
) -> RulerTask:
    """The paragraphs as numbered documents in any order, and up to four of the questions."""
    rng.shuffle(paragraphs)
    body = "\n\n".join(f"Document {i + 1}:\n{text}" for i, text in enumerate(paragraphs))
    chosen = rng.sample(list(questions), min(QUESTIONS, len(questions)))
    return RulerTask(
        f"{ASKED}\n\nThe following are given documents.\n\n{body}",
        tuple(
            RulerQuestion(f"\n\n{ASKED}\n\nQuestion: {question} Answer:", (answer,))
            for question, answer in chosen
        ),
    )


def one_document(size: int, hay: Haystack, rng: random.Random) -> RulerTask:
    """Companies and who founded them, one a document."""
    firms = [w.replace("-", " ").title() for w in pairs_of_words(size, rng)]
    founders = people(size, rng)
    paragraphs = [
        f"{firm} is a company in {rng.choice(CITIES)}. It was founded in "
        f"{rng.randrange(1850, 2000)} by {founder}, who had been a {rng.choice(TRADES)}. Its first "
        f"product was a tool for every {rng.choice(TRADES)}, and today {firm} has "
        f"{rng.randrange(20, 5000)} workers."
        for firm, founder in zip(firms, founders, strict=True)
    ]
    asked = [(f"Who founded {firm}?", who) for firm, who in zip(firms, founders, strict=True)]
    return documents(paragraphs, asked, rng)


def two_documents(size: int, hay: Haystack, rng: random.Random) -> RulerTask:
    """Bridges and builders, builders and where they were born: two documents a question."""
    bridges = [w.replace("-", " ").title() for w in pairs_of_words(size, rng)]
    builders = people(size, rng)
    homes = [rng.choice(CITIES) for _ in builders]
    paragraphs = [
        f"The {bridge} Bridge is {rng.randrange(80, 900)} metres long. It was built by {builder} "
        f"and opened in {rng.randrange(1850, 2000)}."
        for bridge, builder in zip(bridges, builders, strict=True)
    ] + [
        f"{builder} was born in {home} and learnt the trade of a {rng.choice(TRADES)} before "
        "turning to bridges."
        for builder, home in zip(builders, homes, strict=True)
    ]
    asked = [
        (f"In which city was the builder of the {bridge} Bridge born?", home)
        for bridge, home in zip(bridges, homes, strict=True)
    ]
    return documents(paragraphs, asked, rng)


KINDS: dict[str, RulerKind] = {
    "niah_single_1": RulerKind(partial(needles, haystack="noise"), 128),
    "niah_single_2": RulerKind(needles, 128),
    "niah_single_3": RulerKind(partial(needles, values="uuids"), 128),
    "niah_multikey_1": RulerKind(partial(needles, num_keys=4), 128),
    "niah_multikey_2": RulerKind(partial(needles, haystack="needles", num_keys=4), 128),
    "niah_multikey_3": RulerKind(
        partial(needles, haystack="needles", keys="uuids", values="uuids", num_keys=4), 128
    ),
    "niah_multivalue": RulerKind(partial(needles, num_values=4), 128),
    "niah_multiquery": RulerKind(partial(needles, num_queries=4), 128),
    "vt": RulerKind(variable_tracking, 30),
    "cwe": RulerKind(common_words, 120),
    "fwe": RulerKind(frequent_words, 50),
    "qa_1": RulerKind(one_document, 32, match_part),
    "qa_2": RulerKind(two_documents, 32, match_part),
}


def ruler_task(kind: str, hay: Haystack, length: int, sample: int, seed: int = 0) -> RulerTask:
    """The `sample`-th task of a kind, as long as fits a context of nominally `length` tokens.

    Raises:
        InvalidRequestError: the shortest task of the kind is longer.
    """
    room = min(hay.sealed_length(length), hay.max_tokens - QUESTION_TOKENS) - len(hay.prefix)
    build = KINDS[kind].build

    def made(size: int) -> RulerTask:
        return build(size, hay, random.Random(f"{seed}/{kind}/{length}/{sample}"))

    @cache
    def tokens(size: int) -> int:
        return len(hay.encode(made(size).context))

    small = 1
    if tokens(small) > room:
        raise InvalidRequestError(
            f"{kind} has no task of {length} tokens; its shortest is longer: name a longer length"
        )
    large = 2
    while tokens(large) <= room:
        # in proportion, which is never too large but for what a task has beside its units
        small, large = large, max(large * room // tokens(large), large + 1 + large // 16)
    while large - small > max(1, small // 64):  # a context may be 1.5 % shorter than it could be
        middle = (small + large) // 2
        small, large = (middle, large) if tokens(middle) <= room else (small, middle)
    return made(small)
