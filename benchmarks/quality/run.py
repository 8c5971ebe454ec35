"""`spectral-paged bench quality`: judges the formats of one model and writes a report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectral_paged.benchmarks.quality import texts as text_sources
from spectral_paged.benchmarks.quality.causes import CAUSES, judge_causes
from spectral_paged.benchmarks.quality.experiments import (
    EXPERIMENTS,
    Experiment,
    judge_experiments,
    weighting_pair,
)
from spectral_paged.benchmarks.quality.formats import MethodSet, unique
from spectral_paged.benchmarks.quality.journal import Journal
from spectral_paged.benchmarks.quality.judge import (
    judge_continuation,
    judge_generation,
    judge_needles,
    judge_tasks,
)
from spectral_paged.benchmarks.quality.layers import judge_reconstruction, judge_sensitivity
from spectral_paged.benchmarks.quality.methods import Calibrated, Method
from spectral_paged.benchmarks.quality.needle_tokens import judge_needle_tokens
from spectral_paged.benchmarks.quality.plots import pareto_of_models
from spectral_paged.benchmarks.quality.replay import Replay
from spectral_paged.benchmarks.quality.report import write_report
from spectral_paged.benchmarks.quality.ruler import judge_ruler
from spectral_paged.benchmarks.quality.sources import harness_digest
from spectral_paged.benchmarks.quality.spectra import judge_spectra
from spectral_paged.benchmarks.quality.summary import aggregate
from spectral_paged.benchmarks.quality.tasks import (
    Haystack,
    Window,
    continuation_windows,
    generation_prompts,
)
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.calibration import model_fingerprint
from spectral_paged.models.loader import LoadedModel, load_model
from spectral_paged.options import DEFAULT_MODEL

QUICK_SECTIONS = ("continuation", "needles", "reconstruction")
QUICK_LENGTHS, FULL_LENGTHS = (1024, 2048), (2048, 4096, 8192)
QUICK_WINDOWS, FULL_WINDOWS = 4, 16
QUICK_NEEDLES, FULL_NEEDLES = 16, 64
QUICK_SAMPLES, FULL_SAMPLES = 1, 8
SEGMENTS = (512, 2048, 8192)
SEGMENT_WINDOWS, SENSITIVITY_WINDOWS = 4, 2
COMPANIONS = ("fp8-unit", "kivi3")  # peers in the section of free generation
CALIBRATION_TOKENS = 2048  # tokens for calibrated peers, of texts that are never judged


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments of `bench quality`; None and empty stand for the default, quick or full."""

    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str = "auto"
    formats: Sequence[str] = ()
    variants: Sequence[str] = ()
    peers: bool = True
    sections: Sequence[str] = ()
    quick: bool = False
    lengths: Sequence[int] = ()
    windows: int | None = None
    continuation_tokens: int = 256
    needles: int | None = None
    samples: int | None = None
    texts: Sequence[str] = ()
    calibration: str = "auto"
    journal: Path | None = None
    output_dir: Path = Path("benchmarks/results")
    time_limit: float | None = None
    report_only: bool = False  # write a report of the journal, judge nothing

    @property
    def label(self) -> str:
        """The model's name in file names, which may have dots (Qwen2.5-0.5B)."""
        return Path(self.model).name.removesuffix(".gguf")


class OutOfTime(Exception):
    """The time limit is reached; finished work is in the journal."""


@dataclass(slots=True)
class Progress:
    """Prints each finished unit of work with the elapsed seconds; raises OutOfTime at the limit.

    It is called after whole units of work, so no context is judged under half of the methods.
    """

    limit: float | None = None
    begin: float = field(default_factory=time.monotonic)

    def __call__(self, text: str) -> None:
        elapsed = time.monotonic() - self.begin
        print(f"[{elapsed:8.1f} s] {text}", flush=True)
        if self.limit is not None and elapsed > self.limit:
            raise OutOfTime


class Run:
    """A run over one model: a Python method for each section, and the results of all."""

    def __init__(self, options: Options, loaded: LoadedModel) -> None:
        if loaded.tokenizer is None:
            raise InvalidRequestError(f"model {loaded.name!r} has no tokenizer to read texts with")
        self.options, self.loaded = options, loaded
        self.progress = Progress(options.time_limit)
        self.replay = Replay(loaded)
        self.notes: list[str] = []
        self.texts = text_sources.judged_texts(options.texts)
        if not options.texts:
            more, missing = text_sources.hub_texts()
            self.texts += more
            self.notes += missing
        limit = loaded.geometry.max_position_embeddings
        self.hay = Haystack(self.texts, loaded.tokenizer, limit)
        self.methods = MethodSet(
            loaded,
            options.formats,
            variants=options.variants,
            calibration=options.calibration,
            peers=options.peers,
        )
        self.sections = self._chosen_sections()
        self.experiments: list[Experiment] = [
            build(self.methods) for name, build in EXPERIMENTS.items() if name in self.sections
        ]
        self.causes = [
            e for name in CAUSES if name in self.sections for e in CAUSES[name](self.methods)
        ]
        file = options.journal or Path("build/quality") / f"{options.label}.jsonl"
        self.journal = Journal(file, self._journal_name())
        default = QUICK_LENGTHS if options.quick else FULL_LENGTHS
        self.lengths = list(options.lengths) or [n for n in default if n <= limit] or [limit]

    def _chosen_sections(self) -> list[str]:
        given, usual = self.options.sections, list(dict.fromkeys([*SECTIONS, *EXPERIMENTS]))
        known = [*usual, *CAUSES]
        if unknown := [s for s in given if s not in known]:
            raise InvalidRequestError(f"--sections {','.join(unknown)}: use {', '.join(known)}")
        return list(given or (QUICK_SECTIONS if self.options.quick else usual))

    def _journal_name(self) -> str:
        model = self.loaded.model
        return (
            f"{self.options.label} {model_fingerprint(model)} {model.dtype} {model.device.type} "
            f"{harness_digest()}"
        )

    # ---- sections ------------------------------------------------------------------------

    @property
    def num_windows(self) -> int:
        return self.options.windows or (QUICK_WINDOWS if self.options.quick else FULL_WINDOWS)

    @property
    def base_length(self) -> int:
        """The context length of experiments and of sections by layer."""
        return 2048 if 2048 in self.lengths else self.lengths[0]

    def windows(self, length: int, count: int | None = None) -> list[Window]:
        """The first `count` windows of a length, the same ones in every section."""
        count = self.num_windows if count is None else min(count, self.num_windows)
        tokens = self.options.continuation_tokens
        return continuation_windows(self.hay, length, self.num_windows, tokens)[:count]

    @property
    def shared(self) -> dict[str, Any]:
        return {"journal": self.journal, "progress": self.progress}

    def continuation(self) -> None:
        for length in self.lengths:
            windows = self.windows(length)
            judge_continuation(self.replay, self.methods.main, windows, **self.shared)

    @property
    def num_facts(self) -> int:
        """The number of needles, and of task answers, that the exact cache has to recall."""
        return self.options.needles or (QUICK_NEEDLES if self.options.quick else FULL_NEEDLES)

    def needles(self) -> None:
        target = self.num_facts
        found = judge_needles(
            self.replay, self.methods.main, self.hay, self.lengths, target=target, **self.shared
        )
        if not found["reached"]:
            self.notes.append(
                f"needles: the exact cache recalled {found['exact']['total'][0]} of "
                f"{found['exact']['total'][1]} asked, fewer than the {target} wanted"
            )

    def tasks(self) -> None:
        judge_tasks(
            self.replay,
            self.methods.main,
            self.hay,
            self.lengths[:2],
            target=self.num_facts,
            **self.shared,
        )

    def ruler(self) -> None:
        default = QUICK_SAMPLES if self.options.quick else FULL_SAMPLES
        samples = self.options.samples or default
        too_short = judge_ruler(
            self.replay,
            self.methods.main,
            self.hay,
            self.lengths,
            samples=samples,
            **self.shared,
        )
        self.notes += [f"ruler: {text}" for text in too_short]

    def find_causes(self) -> None:
        """Judge all variants of `sides` and `scales` together, length by length."""
        methods = unique(m for e in self.causes for m in e.methods)
        for length in self.lengths:
            judge_causes(
                self.replay,
                methods,
                self.windows(length),
                self.hay,
                length,
                target=self.num_facts,
                **self.shared,
            )

    def compare(self) -> None:
        """Judge all experiments at once, so that a context is prefilled once for all formats."""
        windows = self.windows(self.base_length)
        judge_experiments(self.replay, self.experiments, windows, self.hay, **self.shared)

    def reconstruction(self) -> None:
        (window,) = self.windows(self.base_length, 1)
        judge_spectra(self.replay, window, **self.shared)
        judge_reconstruction(self.replay, self.methods.main, window, **self.shared)

    def needle_tokens(self) -> None:
        pair = weighting_pair(self.methods)
        judge_needle_tokens(self.replay, pair, self.hay, self.base_length, **self.shared)

    def segments(self) -> None:
        """Judge prefill over pages, for our formats only, because the peers have no such rule."""
        length = max(self.lengths)
        windows = self.windows(length, SEGMENT_WINDOWS)
        judge_continuation(self.replay, self.methods.ours, windows, **self.shared)
        for segment in SEGMENTS:
            if segment < length:
                judge_continuation(
                    self.replay, self.methods.ours, windows, segment=segment, **self.shared
                )

    def sensitivity(self) -> None:
        windows = self.windows(self.base_length, SENSITIVITY_WINDOWS)
        judge_sensitivity(self.replay, self.methods.ours, windows, **self.shared)

    def generation(self) -> None:
        peers: list[Method] = [m for m in self.methods.peers if m.name in COMPANIONS]
        limit = self.loaded.geometry.max_position_embeddings
        lengths = tuple(n for n in (500, 1500, 3000) if n + 256 < limit)
        prompts = generation_prompts(self.hay, lengths)
        judge_generation(self.replay, [*self.methods.ours, *peers], prompts, **self.shared)

    # ---- the whole -----------------------------------------------------------------------

    def judge(self) -> None:
        """Judge every chosen section, until the time limit."""
        if any(isinstance(m, Calibrated) for m in self.methods.peers):
            text = "\n\n".join(t.text for t in text_sources.calibration_texts())
            limit = min(CALIBRATION_TOKENS, self.hay.max_tokens)
            self.replay.calibrate(self.methods.peers, self.hay.encode(text)[:limit])
        steps = [(name, work) for name, work in SECTIONS.items() if name in self.sections]
        if self.experiments:
            steps.insert(sum(n in FIRST for n, _ in steps), ("experiments", Run.compare))
        if self.causes:
            steps.append(("sides and scales", Run.find_causes))
        for i, step in enumerate(steps):
            try:
                step[1](self)
            except OutOfTime:
                left = ", ".join(name for name, _ in steps[i:])
                self.notes.append(
                    f"the time limit of {self.options.time_limit:g} s was reached: {left} did not "
                    "finish; the same command goes on from there"
                )
                return

    def results(self) -> dict[str, Any]:
        """The results value of the records that this run found or made."""
        geometry = self.loaded.geometry
        basis = self.methods.basis
        return aggregate(
            self.journal.used(),
            main=[m.name for m in self.methods.main],
            comparisons=[
                *(e.described(self.base_length) for e in self.experiments),
                *(e.described(length) for length in self.lengths for e in self.causes),
            ],
            model=self.options.label,
            environment={
                **environment(),
                "device": str(self.loaded.model.device),
                "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            },
            texts=text_sources.manifest(self.texts),
            notes=self.notes,
            calibration=None if basis is None else basis.id,
            num_layers=geometry.num_layers,
            num_q_heads=geometry.num_q_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            formats=self.methods.formats,
        )


SECTIONS: dict[str, Callable[[Run], None]] = {  # in the order of work
    "continuation": Run.continuation,
    "needles": Run.needles,
    "tasks": Run.tasks,
    "ruler": Run.ruler,
    "reconstruction": Run.reconstruction,
    "weighting": Run.needle_tokens,
    "segments": Run.segments,
    "sensitivity": Run.sensitivity,
    "generation": Run.generation,
}
FIRST = ("continuation", "needles", "tasks", "ruler")  # before the experiments


def main(options: Options) -> int:
    """Judge, then write `quality-<model>.json`, `.md` and pictures to `output_dir`."""
    device = choose_device(options.device)
    loaded = load_model(options.model, device=device, dtype=choose_dtype(options.dtype, device))
    run = Run(options, loaded)
    code = 0
    try:
        if options.report_only:
            if cut := run.journal.use_all():
                run.notes.append(f"{cut} units of work were cut off half done and are left out")
        else:
            run.judge()
    except KeyboardInterrupt:
        run.notes.append("the run was interrupted; the same command goes on from there")
        code = 130
    results = run.results()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    name = f"quality-{options.label}" + ("-cuda" if device.type == "cuda" else "")
    report, raw = (options.output_dir / f"{name}.{ending}" for ending in ("md", "json"))
    raw.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files = write_report(results, report)
    print(f"{raw}\n" + "\n".join(map(str, files)))
    return code


def plot(files: Sequence[Path], output_dir: Path) -> int:
    """Draw `quality-pareto.png`: ratio against KL, a panel a results file."""
    results = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            results.append((str(found["model"]), found["overall"]["methods"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"{file} has no results of `bench quality` with a continuation section"
            ) from error
    output_dir.mkdir(parents=True, exist_ok=True)
    picture = output_dir / "quality-pareto.png"
    pareto_of_models(results, picture)
    print(picture)
    return 0
