"""The report of `spectral-paged info`: bytes a token, pages and capacity of a model, by format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spectral_paged.cache import retention_of
from spectral_paged.errors import FormatError
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.pages import PRESETS, PageFormat

ITEMSIZE = 2  # a GPU run stores exact pages in 16-bit elements
REPORTED_LENGTHS = (8192, 32768, 131072)


@dataclass(frozen=True, slots=True)
class FormatReport:
    """The bytes of a format in all layers of a model.

    `bytes_at` and `ratio_at` are of one sequence, by its number of tokens. They include its
    landmarks, tail and padding.
    """

    name: str
    page_bytes: int
    bytes_per_token: float
    page_ratio: float
    bytes_at: dict[int, int]
    ratio_at: dict[int, float]
    capacity_tokens: int
    num_pages: int


def sequence_bytes(format: PageFormat, windows: Sequence[int | None], num_tokens: int) -> int:
    """Return the bytes of a generating sequence of `num_tokens`, at 2 bytes an exact element.

    windows: the sliding window of each layer, or None.
    """
    return sum(
        count
        * retention_of(format, window).while_generating(num_tokens).num_bytes(format, ITEMSIZE)
        for window, count in Counter(windows).items()
    )


def report_format(format: PageFormat, geometry: ModelGeometry, memory_bytes: int) -> FormatReport:
    """Return the figures of one format.

    The capacity counts sealed tokens (exact ones for `exact`), in the layers without a sliding
    window if there are any.
    """
    layers = geometry.windows.count(None) or geometry.num_layers
    plain = geometry.num_kv_heads * geometry.head_dim * 2 * ITEMSIZE
    if format.seals:
        slot_bytes, slot_tokens = format.page_bytes * layers, BLOCK_TOKENS
    else:
        slot_bytes = format.exact_page_bytes(ITEMSIZE) * layers
        slot_tokens = EXACT_PAGE_TOKENS
    lengths = [n for n in REPORTED_LENGTHS if n <= geometry.max_position_embeddings]
    bytes_at = {n: sequence_bytes(format, geometry.windows, n) for n in lengths}
    plain_at = {n: plain * sum(min(n, w or n) for w in geometry.windows) for n in lengths}
    num_slots = memory_bytes // slot_bytes
    return FormatReport(
        name=format.name,
        page_bytes=format.page_bytes,
        bytes_per_token=slot_bytes / slot_tokens,
        page_ratio=format.page_ratio,
        bytes_at=bytes_at,
        ratio_at={n: plain_at[n] / b for n, b in bytes_at.items()},
        capacity_tokens=num_slots * slot_tokens,
        num_pages=num_slots,
    )


def model_report(name: str, geometry: ModelGeometry, memory_bytes: int) -> str:
    """Return a table of every preset for a model, as text.

    Raises:
        FormatError: no preset fits the model's heads.
    """
    lines = [
        f"{name}: {geometry.num_layers} layers, {geometry.num_q_heads} query heads, "
        f"{geometry.num_kv_heads} KV heads of width {geometry.head_dim}, "
        f"{geometry.max_position_embeddings} positions",
        f"memory for the cache: {memory_bytes} bytes; exact elements of {ITEMSIZE} bytes",
        "",
    ]
    reports, notes = [], []
    for preset in PRESETS:
        try:
            format = PageFormat.preset(
                preset, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim
            )
        except FormatError as error:
            notes.append(f"{preset}: {error}")
            continue
        reports.append(report_format(format, geometry, memory_bytes))
    if not reports:
        raise FormatError(f"no format fits {name}: {'; '.join(notes)}")
    lengths = list(reports[0].ratio_at)
    head = f"{'format':20} {'page bytes':>10} {'B/token':>9} {'page':>6}"
    head += "".join(f" {f'at {n // 1024}K':>8}" for n in lengths)
    lines.append(head + f" {'pages':>9} {'tokens':>10}")
    for r in reports:
        row = f"{r.name:20} {r.page_bytes or '-':>10} {r.bytes_per_token:9.1f} {r.page_ratio:5.2f}x"
        row += "".join(f" {r.ratio_at[n]:7.2f}x" for n in lengths)
        lines.append(row + f" {r.num_pages:>9} {r.capacity_tokens:>10}")
    lines += [
        "",
        "page bytes: one block of 512 tokens, one layer. page: ratio of a sealed page against 2",
        "bytes an element; at nK: of a whole sequence with landmarks, tail, scales and padding.",
        "pages, tokens: what the memory holds (exact: pages of 64 tokens).",
    ]
    windows = Counter(window for window in geometry.windows if window is not None)
    for window, count in windows.items():
        lines.append(
            f"{count} of {geometry.num_layers} layers see {window} tokens: what they hold is only "
            "in the columns at nK."
        )
    return "\n".join(lines + notes)
