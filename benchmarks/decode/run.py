"""`spectral-paged bench decode`: speed of decode attention over pages against the best of bf16.

Timed pages have the right layout and random bytes. A format gets a row only if this device reads
pages that the codec wrote to within `MAX_ERROR` of the fp32 twin. The row carries the KL that
`bench quality` measured; a format never judged has no row. Times are of replayed CUDA graphs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_paged.benchmarks.decode import report as decode_report
from spectral_paged.benchmarks.decode.flashinfer import best_ways, installed
from spectral_paged.benchmarks.decode.inputs import LANDMARKS, ExactPages, Pages
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.conformance.inputs import structured_blocks, toy_calibration
from spectral_paged.errors import InvalidRequestError
from spectral_paged.kernels.decode import batch as decode_batch, gpu as pages_op
from spectral_paged.kernels.decode.batch import ExactTokens
from spectral_paged.kernels.decode.gpu import decode_attention
from spectral_paged.kernels.decode.reference import spectral_decode as twin
from spectral_paged.kernels.decode.triton import exact as exact_op
from spectral_paged.kernels.launch.configs import DecodeConfig, gpus_of, launch_table
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.page.layout import UNIT_BYTES
from spectral_paged.pages import PRESETS, PageFormat, encode_pages
from spectral_paged.rope import RotaryTable

SHAPES = {  # query heads, KV heads, head width
    "llama-3-8b": (32, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
    "qwen2.5-1.5b": (12, 2, 128),
    "smollm2-135m": (9, 3, 64),
    "mha-64": (16, 16, 64),
}
WORK = ((64, 16384), (32, 8192), (8, 8192), (1, 32768))
MORE_WORK = ((128, 2048), (8, 32768), (1, 131072))  # for the first shape only
MIXED = (131072, 65536, 32768, 16384, 8192, 4096, 2048, 1024, 512, 0)
MAX_ERROR = 5e-3
TAIL = 384  # exact tokens behind the pages: 64 to 639
COPY_BYTES = 2 << 30
ROPE_THETA = 500000.0


@dataclass(frozen=True, slots=True)
class Row:
    """The measurement of one operation."""

    shape: str
    work: str
    what: str
    part: str  # pages | attend (landmarks, pages, tail)
    ms: float
    gigabytes_per_second: float
    copy_share: float
    speedup: float  # against the fastest bf16 kernel of the run
    error: float | None = None
    fingerprint: str = ""
    kl: dict[str, float] | None = None


def graph_ms(work: Callable[[], object], *, replays: int = 20) -> float:
    """Median milliseconds of a replay of `work` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))
    return times[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes per second that a device copy reads and writes.

    The faster of a memcpy node of a graph and an elementwise kernel counts."""
    source = torch.zeros(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.add(source, 1.0, out=target))
    return 2 * COPY_BYTES / (min(graph_ms(way, replays=10) for way in ways) * 1e-3)


# ---- quality that was measured -----------------------------------------------------------


def judged(format: PageFormat, results: Path) -> dict[str, float]:
    """KL of a format by model, from the results of `bench quality` in the folder `results`.

    Every field but name, number of heads, calibration and `prefill_segment` must be the same, and
    tokens must not be weighed by attention."""
    skipped = ("name", "num_kv_heads", "basis_id", "prefill_segment")
    found = {}
    for file in sorted(results.glob("quality-*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        table = data.get("overall", {}).get("methods", {})
        for name, fields in data.get("formats", {}).items():
            same = fields.get("token_weighting", "none") == "none" and all(
                json.loads(json.dumps(value)) == fields.get(key)
                for key, value in asdict(format).items()
                if key not in skipped
            )
            if same and name in table:
                found[file.stem.removeprefix("quality-")] = table[name]["kl"]
    return found


# ---- inputs ------------------------------------------------------------------------------


def worst_error(format: PageFormat, num_q_heads: int, rope: RotaryTable) -> float:
    """Largest relative error against the twin over ragged block tables of a poisoned plane."""
    k, v = structured_blocks(6, format, "cuda")
    given: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    if format.needs_calibration:
        bound = toy_calibration(format, k, v)
        format, given = bound.format, {"basis": bound, "layers": [0] * 6}
        if format.basis == "shared":
            rows = {"k_basis": bound.k.rows[0].half(), "v_basis": bound.v.rows[0].half()}
    pages = encode_pages(k, v, format, **given)
    units, size = format.page_bytes // UNIT_BYTES, format.page_bytes
    plane = torch.full((9 * size,), 255, dtype=torch.uint8, device="cuda")
    place = [7, 0, 4, 2, 8, 5]
    for i, at in enumerate(place):
        plane[at * size : (at + 1) * size] = pages[i]
    far = 10**6
    table = [
        [far] * 4,
        [place[0] * units, -1, place[1] * units, place[2] * units],
        [place[3] * units, far, far, far],
        [place[4] * units, place[5] * units, place[0] * units, far],
    ]
    tables = torch.tensor(table, dtype=torch.int32, device="cuda")
    counts = torch.tensor([0, 4, 1, 3], device="cuda")
    q = 2 * torch.randn(4, num_q_heads, format.head_dim, device="cuda")
    common: dict[str, Any] = {
        "layout": format.layout,
        "first_position": 64,
        "cos": rope.cos,
        "sin": rope.sin,
        "scale": format.head_dim**-0.5,
        **rows,
    }
    want = twin(q, plane, tables, counts, **common | {name: x.float() for name, x in rows.items()})
    got = pages_op.spectral_decode(q, plane, tables, counts, **common)
    if bool(got[0][0].any()) or not bool(torch.isneginf(got[1][0]).all()):
        return math.inf
    errors = [float((x - y)[1:].norm() / y[1:].norm()) for x, y in zip(got, want, strict=True)]
    return max(errors)


# ---- timing ------------------------------------------------------------------------------


class Workload:
    """The queries of one shape and batch, and the timing of every kernel on them."""

    def __init__(self, shape: str, lengths: Sequence[int], name: str, bandwidth: float) -> None:
        self.shape, self.name, self.lengths, self.bandwidth = shape, name, lengths, bandwidth
        self.num_q_heads, self.heads, self.dim = SHAPES[shape]
        self.scale = self.dim**-0.5
        self.q = torch.randn(
            len(lengths), self.num_q_heads, self.dim, dtype=torch.bfloat16, device="cuda"
        )
        self.best_bf16 = math.inf

    def _row(self, what: str, part: str, ms: float, num_bytes: float, **rest: Any) -> Row:
        rate = num_bytes / (ms * 1e-3)
        return Row(
            self.shape,
            self.name,
            what,
            part,
            ms,
            rate / 1e9,
            rate / self.bandwidth,
            self.best_bf16 / ms,
            **rest,
        )

    def baselines(self) -> list[Row]:
        """Time the bf16 and fp8 kernels; speedups are against the fastest in bf16."""
        found = []
        exact = ExactPages.random(self.lengths, self.heads, self.dim)

        def work() -> tuple[Tensor, Tensor]:
            return exact_op.exact_decode(
                self.q,
                exact.plane,
                exact.table,
                exact.tokens,
                num_kv_heads=self.heads,
                scale=self.scale,
                dtype=torch.bfloat16,
                plan=exact.plan,
            )

        found.append(("exact_decode bf16", graph_ms(work), exact.num_bytes))
        found += [(name, ms, exact.num_bytes) for name, ms in self._library_kernels()]
        found += best_ways(self.q, self.lengths, self.heads, graph_ms)
        self.best_bf16 = min(ms for name, ms, _ in found if "bf16" in name)
        return [self._row(name, "pages", ms, size) for name, ms, size in found]

    def _library_kernels(self) -> Iterable[tuple[str, float]]:
        if len(set(self.lengths)) == 1:
            shape = (len(self.lengths), self.heads, self.lengths[0], self.dim)
            k, v = torch.randn(2, *shape, dtype=torch.bfloat16, device="cuda")
            q = self.q.unsqueeze(2)
            yield (
                "torch sdpa bf16, not paged",
                graph_ms(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
            )

    def page_op(
        self, format: PageFormat, rope: RotaryTable
    ) -> tuple[Callable[[], tuple[Tensor, Tensor]], int]:
        """A call of `spectral_decode` over `lengths` tokens, and the bytes of the pages."""
        pages = Pages.random(format, self.lengths, rope)
        plan = pages.plan()

        def work() -> tuple[Tensor, Tensor]:
            return pages_op.spectral_decode(
                self.q,
                pages.plane,
                pages.table,
                pages.counts,
                scale=self.scale,
                plan=plan,
                **pages.options,
            )

        return work, pages.num_bytes

    def attend_op(
        self, format: PageFormat, rope: RotaryTable
    ) -> tuple[Callable[[DecodeConfig | None], Tensor], int]:
        """A call of `decode_attention` over pages, landmarks and tail, and the bytes of all.

        The call takes the launch of its kernels; None stands for the table's."""
        pages = Pages.random(format, self.lengths, rope)
        exact = ExactPages.random([LANDMARKS + TAIL] * len(self.lengths), self.heads, self.dim)
        plane = torch.cat((pages.plane, exact.plane))
        tokens = ExactTokens(
            exact.table + len(pages.plane) // UNIT_BYTES,
            exact.tokens,
            self.heads,
            torch.bfloat16,
            plan=exact.plan,
        )
        scores = Scores(self.scale)
        planned: dict[DecodeConfig | None, decode_batch.Pages] = {}

        def work(config: DecodeConfig | None = None) -> Tensor:
            if config not in planned:
                planned[config] = pages.planned(config)
            return decode_attention(self.q, plane, tokens, planned[config], scores, pages.basis)

        return work, pages.num_bytes + exact.num_bytes

    def pages(self, format: PageFormat, rope: RotaryTable, error: float, **about: Any) -> list[Row]:
        """Time the pages without and with landmarks and tail, over `lengths` tokens."""
        about = {"error": error, "fingerprint": format.fingerprint, **about}
        op, num_bytes = self.page_op(format, rope)
        rows = [self._row(format.name, "pages", graph_ms(op), num_bytes, **about)]
        whole, num_bytes = self.attend_op(format, rope)

        def attend() -> Tensor:
            return whole(None)

        return [*rows, self._row(format.name, "attend", graph_ms(attend), num_bytes, **about)]


def with_quality(result: dict[str, Any], results: Path) -> dict[str, Any]:
    """`result` with the present KL of its formats, from the folder `results`."""
    for row in result["rows"]:
        name = row["what"].split(" (")[0]
        if row["error"] is not None:
            same = [
                f for f in formats_of(row["shape"], [name]) if f.fingerprint == row["fingerprint"]
            ]
            row["kl"] = judged(same[0], results) if same else {}
    return result


def formats_of(shape: str, names: Sequence[str]) -> list[PageFormat]:
    """The presets `names`, by default all, for the heads of a shape."""
    _, heads, dim = SHAPES[shape]
    chosen = [n for n in names or PRESETS if n != "exact"]
    return [PageFormat.preset(n, num_kv_heads=heads, head_dim=dim) for n in chosen]


def main(
    *,
    output_dir: Path,
    results: Path,
    shapes: Sequence[str] = (),
    formats: Sequence[str] = (),
    unjudged: bool = False,
    report_only: bool = False,
) -> int:
    """Measure, print a table, write `decode.json` and its report.

    `unjudged` measures formats without a KL too; the report leaves them out until they have one.
    `report_only` writes the report of an earlier result again, with the present KL.

    Raises:
        InvalidRequestError: an unknown shape.
        CorruptFileError: `report_only` without an earlier result.
    """
    if report_only:
        earlier = decode_report.read(output_dir / "decode.json")
        print(*decode_report.write(with_quality(earlier, results), output_dir), sep="\n")
        return 0
    if unknown := [s for s in shapes if s not in SHAPES]:
        raise InvalidRequestError(f"--shape {', '.join(unknown)}: use {', '.join(SHAPES)}")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: device copy {bandwidth / 1e12:.2f} TB/s")
    if not installed():
        print("flashinfer is not installed: it has no rows")
    found: list[Row] = []
    for shape in shapes or SHAPES:
        num_q_heads, _, dim = SHAPES[shape]
        rope = RotaryTable.from_theta(ROPE_THETA, dim, max_positions=140_000, device="cuda")
        checked = []
        for format in formats_of(shape, formats):
            kl = judged(format, results)
            if not kl and not unjudged:
                print(f"{format.name} at width {dim}: quality not measured, so no row")
                continue
            error = worst_error(format, num_q_heads, rope)
            if error > MAX_ERROR:
                print(f"{format.name} at {shape}: error {error:.1e} against the twin, so no row")
                continue
            how = pages_op.implementation(
                format.layout, num_q_heads // format.num_kv_heads, torch.device("cuda")
            )
            checked.append((replace(format, name=f"{format.name} ({how})"), kl, error))
        more = MORE_WORK if shape == next(iter(SHAPES)) else ()
        for batch, length in (*WORK, *more, (0, 0)):
            lengths = [length] * batch or list(MIXED)
            name = f"{batch} x {length}" if batch else "mixed, 0 to 131072"
            work = Workload(shape, lengths, name, bandwidth)
            rows = work.baselines()
            for format, kl, error in checked:
                rows += work.pages(format, rope, error, kl=kl)
            for row in rows:
                mark = f"{row.error:.1e}" if row.error is not None else "-"
                print(
                    f"{shape:13} {name:18} {row.what:32} {row.part:6} {row.ms:8.4f} ms "
                    f"{row.gigabytes_per_second:7.0f} GB/s {100 * row.copy_share:5.1f} % of copy "
                    f"{row.speedup:5.2f}x of bf16  error {mark}",
                    flush=True,
                )
            found += rows
            torch.cuda.empty_cache()
            # written after each workload, so that a time limit loses nothing
            result = result_of(found, bandwidth)
            decode_report.write_rows(result, output_dir)
    print(*decode_report.write(result, output_dir), sep="\n")
    return 0


def result_of(rows: Sequence[Row], bandwidth: float) -> dict[str, Any]:
    """The content of `decode.json`."""
    return {
        "environment": environment(),
        "gpu": torch.cuda.get_device_name(),
        "flashinfer": installed(),
        "copy_bytes_per_second": bandwidth,
        "launch_configs": {
            gpu: launch_table().get(gpu, {}) for gpu in gpus_of(torch.device("cuda"))
        },
        "rows": [asdict(row) for row in rows],
    }
