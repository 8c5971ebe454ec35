"""Batch generation on real prompts of very different lengths: completions, a table, a picture.

Run by `make demo`. Eight long prompts (real book text, far over 1,300 tokens) seal pages and are
answered from them; ten short ones ride in the same batch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tqdm import tqdm

from spectral_paged import LLM, SamplingParams
from spectral_paged.outputs import RequestOutput

TEXTS = Path(__file__).parent / "texts"

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
    """Return (title, user message) of every prompt, long and short ones mixed."""
    long = []
    for name, start, count, question in READINGS:
        passage = (TEXTS / name).read_text(encoding="utf-8")[start : start + count]
        message = f"{passage}\n\nAnswer in one sentence. {question}"
        long.append((f"{name.removesuffix('.txt')}: {question}", message))
    short = [(question, question) for question in QUESTIONS]
    mixed = []
    while long or short:
        if long:
            mixed.append(long.pop(0))
        if short:
            mixed.append(short.pop(0))
    return mixed


def run(
    llm: LLM, prompts: list[tuple[str, str]], max_tokens: int
) -> tuple[list[RequestOutput], list[dict[str, object]]]:
    """Run the engine to the end; return outputs in prompt order and its figures after each step."""
    engine = llm.engine
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    for i, (_, message) in enumerate(prompts):
        engine.add_request(str(i), llm.chat_tokens([{"role": "user", "content": message}]), params)
    finished: dict[str, RequestOutput] = {}
    history = []
    with tqdm(total=len(prompts), desc="generate", unit="prompt") as bar:
        while engine.has_unfinished():
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = output
                    bar.update()
            stats = engine.stats()
            history.append(stats)
            bar.set_postfix(running=stats["running"], pool=f"{stats['kv_cache_usage']:.0%}")
    return [finished[str(i)] for i in range(len(prompts))], history


def print_table(prompts: list[tuple[str, str]], outputs: list[RequestOutput]) -> None:
    """Print one line a request; ratios count landmarks, tail, scales, basis and padding."""
    print(
        f"\n{'prompt':44} {'tokens':>6} {'sealed':>6} {'cached':>6} {'tok/s':>6} "
        f"{'B/token':>8} {'ratio':>6}"
    )
    for (title, _), output in zip(prompts, outputs, strict=True):
        metrics = output.metrics
        seconds = metrics.finished_time - metrics.arrival_time
        print(
            f"{title[:44]:44} {len(output.prompt_token_ids):6d} {metrics.num_pages_sealed:6d} "
            f"{metrics.num_cached_tokens:6d} {len(output.outputs[0].token_ids) / seconds:6.1f} "
            f"{metrics.bytes_per_token:8.0f} {metrics.compression_ratio:5.2f}x"
        )


def print_summary(outputs: list[RequestOutput], stats: dict[str, object], seconds: float) -> None:
    """Print totals of the run; both ratios are against 2 bytes an element."""
    read = sum(len(o.prompt_token_ids) for o in outputs)
    written = sum(len(o.outputs[0].token_ids) for o in outputs)
    print(
        f"\n{len(outputs)} prompts, {read} prompt tokens and {written} generated in "
        f"{seconds:.1f} s: {(read + written) / seconds:.0f} tokens/s ({written / seconds:.1f} "
        f"generated/s), backend {stats['backend']}"
    )
    print(
        f"format {stats['format']}: {stats['pages_sealed']} pages sealed, "
        f"{stats['pages_attended']} page reads, {stats['prefix_hit_tokens']} prompt tokens from "
        f"the prefix cache, {stats['preemptions']} preemptions"
    )
    print(
        f"bytes a token {stats['bytes_per_token']:.0f}, ratio {stats['compression_ratio']:.2f}x "
        f"with tail, landmarks, scales and basis counted; a sealed page alone "
        f"{stats['sealed_ratio']:.2f}x. The tail is exact, so the ratio grows with length."
    )


def plot_occupancy(history: list[dict[str, object]], path: Path) -> None:
    """Plot the pool's occupancy after each step of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True)
    steps = range(1, len(history) + 1)
    above.plot(steps, [100 * h["kv_cache_usage"] for h in history], label="bytes in use, %")
    above.plot(steps, [h["running"] for h in history], label="running requests")
    above.plot(steps, [h["waiting"] for h in history], label="waiting requests")
    above.set_ylabel("% of pool / requests")
    above.legend()
    for key, label in (
        ("pages_in_use", "spectral pages in use"),
        ("pages_cached", "spectral pages cached"),
        ("exact_pages_in_use", "exact pages in use"),
        ("exact_pages_cached", "exact pages cached"),
    ):
        below.plot(steps, [h[key] for h in history], label=label)
    below.set_ylabel("pages, all layers")
    below.set_xlabel("engine step")
    below.legend()
    figure.suptitle("Pool occupancy")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv-format", default="auto")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--kv-cache-mib", type=int, default=640)
    parser.add_argument("--picture", type=Path, default=Path("build/demo/pool_occupancy.png"))
    args = parser.parse_args()

    prompts = conversations()
    llm = LLM(
        args.model,
        kv_format=args.kv_format,
        kv_cache_bytes=args.kv_cache_mib << 20,
        max_num_batched_tokens=2048,
    )
    begin = time.monotonic()
    outputs, history = run(llm, prompts, args.max_tokens)
    seconds = time.monotonic() - begin
    for (title, _), output in zip(prompts, outputs, strict=True):
        print(f"\n> {title}\n{output.outputs[0].text.strip()}")
    print_table(prompts, outputs)
    stats = llm.stats()
    print_summary(outputs, stats, seconds)
    if llm.cache.format.seals and not stats["pages_attended"]:
        raise SystemExit("no page was attended: the compressed path did not run")
    plot_occupancy(history, args.picture)
    print(f"pool occupancy over the run: {args.picture}")


if __name__ == "__main__":
    main()
