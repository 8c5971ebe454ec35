"""Eighteen prompts are answered from one paged cache, beside `exact`, which seals nothing.

Run by `make demo`. Eight long prompts (real book text, far over 1,300 tokens) seal pages and are
answered from them; ten short ones ride in the same batch. Two engines over one model run side by
side, so no operation waits for both cores of a busy machine. An answer is printed once both have
it; at the end comes a picture of the bytes in use, as text and as a file.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from tqdm import tqdm

from spectral_paged import LLM, SamplingParams
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.models import loader
from spectral_paged.outputs import RequestOutput, ratio_text

TEXTS = Path(__file__).parent / "texts"
MIB = 1 << 20
EXACT_PAGE = 64  # tokens
MOST_THREADS = 8  # of a model this small, whose operations more threads would only wait for
BAR = 48  # characters

QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about autumn.",
    "What is 12 times 12?",
    "Name three primary colors.",
    "Translate 'good morning' to Spanish.",
    "What does a compiler do?",
    "Give one reason why trees lose their leaves.",
    "Who wrote Romeo and Juliet?",
    "List two uses of a paper clip.",
)

# (file, first character, characters, question); the third shares its text with the first, so its
# prompt hits the prefix cache
READINGS = (
    ("sherlock_holmes.txt", 0, 7000, "Who is Irene Adler to Sherlock Holmes?"),
    ("alice.txt", 0, 8000, "What did Alice see by the river?"),
    ("sherlock_holmes.txt", 0, 7000, "Who tells this story?"),
    ("moby_dick.txt", 0, 9000, "Why does the narrator go to sea?"),
    ("time_machine.txt", 0, 10000, "What does the Time Traveller explain?"),
    ("pride_and_prejudice.txt", 0, 7500, "Who has taken Netherfield Park?"),
    ("cask_of_amontillado.txt", 0, 12000, "What does the narrator plan?"),
    ("moby_dick.txt", 20000, 6500, "Summarize this passage in one sentence."),
)


def conversations() -> list[tuple[str, str]]:
    """Return (title, user message) of every prompt, short and long ones mixed."""
    long = []
    for name, start, count, question in READINGS:
        passage = (TEXTS / name).read_text(encoding="utf-8")[start : start + count]
        message = f"{passage}\n\nAnswer in one sentence. {question}"
        long.append((f"{name.removesuffix('.txt')}: {question}", message))
    short = [(question, question) for question in QUESTIONS]
    mixed = []
    while long or short:
        if short:
            mixed.append(short.pop(0))
        if long:
            mixed.append(long.pop(0))
    return mixed


# ---- two engines side by side ----------------------------------------------------------------


@dataclass
class Run:
    """An engine's answers, the seconds it took, and what its sequences held after each step.

    Bytes count exact pages at 2 bytes an element, as bf16 takes, whatever the run's dtype. The
    bytes that bf16 needs are those of the same sequences' tokens, a shared prefix counted once.
    """

    llm: LLM
    answers: dict[str, RequestOutput] = field(default_factory=dict)
    held_bytes: list[int] = field(default_factory=list)
    bf16_bytes: list[int] = field(default_factory=list)
    pool_bytes: float = 0.0  # of the pool, in the run's dtype, at the peak
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.llm.cache.format.name

    def serve(self, prompts: dict[str, list[int]], max_tokens: int, news: SimpleQueue) -> None:
        """Run the engine to the end; `news` gets a sign after each step, or the error."""
        try:
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
            for name, token_ids in prompts.items():
                self.llm.engine.add_request(name, token_ids, params)
            begin = time.monotonic()
            while self.llm.engine.has_unfinished():
                for output in self.llm.engine.step():
                    if output.error is not None:
                        raise output.error
                    if output.finished:
                        self.answers[output.request_id] = output
                self.seconds = time.monotonic() - begin
                self._count()
                news.put(None)
        except BaseException as error:
            news.put(error)

    def _count(self) -> None:
        cache, stats = self.llm.cache, self.llm.stats()
        format = cache.format
        pages = stats["pages_in_use"] * format.page_bytes if format.seals else 0
        self.held_bytes.append(pages + stats["exact_pages_in_use"] * format.exact_page_bytes(2))
        self.pool_bytes = max(self.pool_bytes, stats["kv_cache_usage"] * stats["kv_cache_bytes"])
        num_tokens, others = 0, []
        for request in self.llm.engine.scheduler.running:
            found = cache.sequence_stats(request.request_id)
            shared = max((len(commonprefix([request.token_ids, o])) for o in others), default=0)
            num_tokens += found["tokens"] - min(found["cached_tokens"], shared)
            others.append(request.token_ids)
        token_bytes = len(cache.layers) * format.exact_page_bytes(2) // EXACT_PAGE
        self.bf16_bytes.append(num_tokens * token_bytes)


def serve(spectral: Run, exact: Run, prompts: list[tuple[str, str]], max_tokens: int) -> None:
    """Run both engines to the end, a thread each, and print each answer once both have it."""
    begin, news = time.monotonic(), SimpleQueue()
    token_ids = {
        str(i): spectral.llm.chat_tokens([{"role": "user", "content": message}])
        for i, (_, message) in enumerate(prompts)
    }
    for run in (spectral, exact):
        Thread(target=run.serve, args=(token_ids, max_tokens, news), daemon=True).start()
    waiting = list(token_ids)
    shape = (
        "{desc}: {n}/{total} after {elapsed}{postfix}"  # the first answers end late: no forecast
    )
    with tqdm(total=len(prompts), desc="answers", bar_format=shape) as bar:
        while waiting:
            error = news.get()
            if error is not None:
                raise error
            stats = spectral.llm.stats()
            bar.set_postfix(running=stats["running"], pages=stats["pages_sealed"])
            for name in [w for w in waiting if w in spectral.answers and w in exact.answers]:
                waiting.remove(name)
                bar.update()
                place = f"[{len(prompts) - len(waiting)}/{len(prompts)}"
                title = f"{place}, {time.monotonic() - begin:.0f} s] {prompts[int(name)][0]}"
                tqdm.write(answer_text(title, spectral, exact, name), file=sys.stdout)
                sys.stdout.flush()


def same_tokens(spectral: Run, exact: Run, name: str) -> int | None:
    """Return how many first tokens of an answer are those of `exact`; None: all, and the end."""
    mine, other = (run.answers[name].outputs[0].token_ids for run in (spectral, exact))
    if mine == other:
        return None
    pairs = enumerate(zip(mine, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(other)))


def answer_text(title: str, spectral: Run, exact: Run, name: str) -> str:
    """Return an answer, what it was read from, and what `exact` says beside it."""
    output, other = spectral.answers[name], exact.answers[name].outputs[0].token_ids
    pages = output.metrics.num_pages_sealed
    sealed = f"{pages} pages sealed" if pages else "nothing sealed"
    tokens = output.outputs[0].token_ids
    same = same_tokens(spectral, exact, name)
    if same is None:
        beside = f"the same {len(tokens)} tokens"
    else:
        there = exact.llm.get_tokenizer().decode(other[same : same + 8], skip_special_tokens=True)
        said = repr(" ".join(there.split())) if there.strip() else "the end of the answer"
        beside = f"the same {same} tokens of {len(tokens)}, then {said}"
    text = " ".join(output.outputs[0].text.split())
    return (
        f"\n{title} ({len(output.prompt_token_ids):,} tokens, {sealed})\n"
        f"  {spectral.name}: {text}\n  exact: {beside}"
    )


# ---- figures --------------------------------------------------------------------------------


def print_table(prompts: list[tuple[str, str]], spectral: Run, exact: Run) -> None:
    """Print one line a request; ratios count landmarks, tail, scales, basis and padding."""
    print(f"\n{'prompt':44} tokens sealed cached B/token  exact  ratio to bf16")
    for i, (title, _) in enumerate(prompts):
        output = spectral.answers[str(i)]
        metrics, same = output.metrics, same_tokens(spectral, exact, str(i))
        print(
            f"{title[:44]:44} {len(output.prompt_token_ids):6d} {metrics.num_pages_sealed:6d} "
            f"{metrics.num_cached_tokens:6d} {metrics.bytes_per_token:7.0f} "
            f"{'same' if same is None else f'to {same}':>6} "
            f"{ratio_text(metrics.compression_ratio)}"
        )


def print_bytes(run: Run) -> None:
    """Draw the run's bytes, and those that bf16 needs for the same tokens, as bars of text."""
    print(
        f"\nbytes in use during the run: {run.name} (pages, and exact pages as in bf16) and what "
        "bf16 needs for the same tokens"
    )
    pairs = list(zip(run.bf16_bytes, run.held_bytes, strict=True))
    unit = max(max(pair) for pair in pairs) / BAR
    width = max(len(run.name), len("bf16"))
    every = max(1, len(pairs) // 10)
    for i in range(every - 1, len(pairs), every):
        ratio = "" if not pairs[i][1] else ratio_text(pairs[i][0] / pairs[i][1])
        rows = zip((f"step {i + 1:3d}", ""), ("bf16", run.name), pairs[i], ("", ratio), strict=True)
        for step, name, size, note in rows:
            bar = "#" * round(size / unit)
            print(f"{step:8}  {name:{width}} {size / MIB:6.1f} MiB {bar:{BAR}} {note}".rstrip())


def plot_bytes(run: Run, path: Path) -> None:
    """Plot the run's bytes, and those that bf16 needs for the same tokens, after each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    for name, sizes in (("bf16, the same tokens", run.bf16_bytes), (run.name, run.held_bytes)):
        mib = [size / MIB for size in sizes]
        axes.plot(range(1, len(mib) + 1), mib, label=f"{name}: {max(mib):.0f} MiB at the peak")
        axes.fill_between(range(1, len(mib) + 1), mib, alpha=0.25)
    axes.set_xlabel("engine step")
    axes.set_ylabel("MiB of K and V (exact pages as in bf16)")
    axes.set_title("Bytes in use")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def print_summary(spectral: Run, exact: Run) -> None:
    """Print the totals of the run, and what the two engines took for it."""
    stats, outputs = spectral.llm.stats(), list(spectral.answers.values())
    on_cpu = spectral.llm.cache.device.type == "cpu"
    read = sum(len(o.prompt_token_ids) for o in outputs)
    written = sum(len(o.outputs[0].token_ids) for o in outputs)
    print(
        f"\n{len(outputs)} prompts, {read:,} prompt tokens and {written} generated, side by side: "
        f"{spectral.name} in {spectral.seconds:.0f} s, exact in {exact.seconds:.0f} s, backend "
        + ("torch (a CPU runs the reference of every kernel)" if on_cpu else stats["backend"])
    )
    print(
        f"{stats['pages_sealed']} pages sealed, {stats['pages_attended']} page reads, "
        f"{stats['prefix_hit_tokens']} prompt tokens from the prefix cache, "
        f"{stats['preemptions']} preemptions"
    )
    print(
        f"bytes a token {stats['bytes_per_token']:.0f}, against bf16 "
        f"{ratio_text(stats['compression_ratio'])} with tail, landmarks, scales and basis counted; "
        f"a sealed page alone {ratio_text(stats['sealed_ratio'])}. The tail is exact, so the ratio "
        "grows with length."
    )
    if spectral.llm.cache.dtype.itemsize > 2:
        print(
            f"exact pages of this run are fp32, so the pool held {spectral.pool_bytes / MIB:.0f} "
            f"MiB at its peak ({exact.pool_bytes / MIB:.0f} MiB in exact); ratios and the picture "
            "count them as in bf16"
        )


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv-format", default="auto")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--kv-cache-mib", type=int, default=640)
    parser.add_argument("--picture", type=Path, default=Path("build/demo/bytes_in_use.png"))
    args = parser.parse_args()

    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads() // 2, MOST_THREADS)))
    device = choose_device("auto")
    print(
        f"loading {args.model}, which the first run converts and calibrates; two engines on "
        f"{device.type}, threads each: {torch.get_num_threads()}",
        flush=True,
    )
    loaded = loader.load_model(args.model, device=device, dtype=choose_dtype("auto", device))
    spectral, exact = (
        Run(LLM(loaded, kv_format=name, kv_cache_bytes=mib * MIB, max_num_batched_tokens=256))
        for name, mib in ((args.kv_format, args.kv_cache_mib), ("exact", 2 * args.kv_cache_mib))
    )
    loading = time.monotonic() - began
    prompts = conversations()
    serve(spectral, exact, prompts, args.max_tokens)
    print_table(prompts, spectral, exact)
    print_summary(spectral, exact)
    print_bytes(spectral)
    plot_bytes(spectral, args.picture)
    stats = spectral.llm.stats()
    if spectral.llm.cache.format.seals and not stats["pages_attended"]:
        raise SystemExit("no page was attended: the compressed path did not run")
    same = sum(same_tokens(spectral, exact, name) is None for name in spectral.answers)
    held, plain = max(spectral.held_bytes), max(spectral.bf16_bytes)
    print(
        f"the same as a picture: {args.picture}\n\nShown: {args.model} answered {len(prompts)} "
        f"prompts from {stats['pages_sealed']} sealed pages, {same} of them token for token as "
        f"exact, in {held / MIB:.0f} MiB at the peak where bf16 needs {plain / MIB:.0f}. It took "
        f"{time.monotonic() - began:.0f} s, {loading:.0f} of them to load."
    )


if __name__ == "__main__":
    main()
