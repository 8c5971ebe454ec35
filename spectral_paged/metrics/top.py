"""A live view of a running batch in the terminal: `pip install '.[top]'`."""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spectral_paged.engine import Snapshot, take_snapshot
from spectral_paged.errors import InvalidRequestError, SpectralPagedError, missing_extra, shown
from spectral_paged.file_limits import MAX_METRICS_BYTES, amount
from spectral_paged.llm import LLM
from spectral_paged.outputs import ratio_text

try:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise missing_extra("the live view needs the package rich", "top") from error

RATE_SECONDS = 5.0
REFRESHES_PER_SECOND = 4


class View:
    """Draws snapshots, with token rates over the last five seconds."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[Snapshot]] = {}

    def _rate(self, name: str, snapshot: Snapshot) -> str:
        first = self._seen[snapshot.engine][0]
        seconds = snapshot.time - first.time
        if seconds <= 0:
            return "-"  # the first snapshot
        return f"{(snapshot.value(name) - first.value(name)) / seconds:,.1f}"

    def _note(self, snapshot: Snapshot) -> None:
        seen = self._seen.setdefault(snapshot.engine, deque())
        seen.append(snapshot)
        while len(seen) > 2 and snapshot.time - seen[0].time > RATE_SECONDS:
            seen.popleft()

    def draw(
        self, snapshots: list[Snapshot], progress: tuple[int, int] | None = None
    ) -> RenderableType:
        """Return a panel for each snapshot, and a bar if `progress` is (lines done, all lines)."""
        parts: list[RenderableType] = []
        for snapshot in snapshots:
            self._note(snapshot)
            parts.append(
                Panel(
                    self._table(snapshot),
                    title=f"{snapshot.model_name} [{snapshot.engine}]",
                    title_align="left",
                )
            )
        if progress is not None:
            done, total = progress
            row = Table.grid(padding=(0, 1), expand=True)
            row.add_column(ratio=1)
            row.add_column(justify="right")
            row.add_row(
                ProgressBar(total=max(total, 1), completed=done), Text(f"{done}/{total} lines")
            )
            parts.append(row)
        return Group(*parts)

    def _table(self, snapshot: Snapshot) -> Table:
        table = Table.grid(padding=(0, 2))
        value = snapshot.value
        asked, hits = value("prefix_cache_queries"), value("prefix_cache_hits")
        prompt, generated = value("prompt_tokens"), value("generation_tokens")
        rows = {
            "requests": [
                f"{value('num_requests_running'):.0f} running",
                f"{value('num_requests_waiting'):.0f} waiting",
                *(f"{n:.0f} {how}" for how, n in snapshot.labels("request_success").items() if n),
                f"{sum(snapshot.labels('request_refused').values()):.0f} refused",
            ],
            "tokens": [
                f"{self._rate('generation_tokens', snapshot)}/s generated",
                f"{self._rate('prompt_tokens', snapshot)}/s prompt",
                f"{generated:,.0f} and {prompt:,.0f} in all",
            ],
            "cache": [
                f"{value('kv_cache_usage_perc'):.1%} in use",
                f"{ratio_text(value('compression_ratio'))} compression",
                f"{hits / asked if asked else 0.0:.1%} of prompt tokens found",
            ],
            "pages": [
                f"{value('pages_sealed'):,.0f} sealed in {value('seal_time_seconds'):.1f} s",
                f"{value('pages_attended'):,.0f} attended",
            ],
            "pressure": [
                f"{value('num_preemptions'):.0f} preemptions",
                f"{value('recomputed_tokens'):,.0f} tokens recomputed",
            ],
            "first token": _percentiles(snapshot, "time_to_first_token_seconds"),
            "between tokens": _percentiles(snapshot, "inter_token_latency_seconds"),
        }
        tiers = {t: n for t, n in snapshot.labels("store_capacity_bytes").items() if n}
        if tiers:
            below = snapshot.labels("prefix_cache_tier_hits")
            used = snapshot.labels("store_bytes")
            rows["store"] = [
                f"{tier} {amount(int(used[tier]))} of {amount(int(size))}, "
                f"{below[tier] / asked if asked else 0.0:.1%} of prompt tokens found"
                for tier, size in tiers.items()
            ]
        for name, words in rows.items():
            table.add_row(Text(name, style="bold"), Text(", ".join(words)))
        return table


def _percentiles(snapshot: Snapshot, name: str) -> list[str]:
    held = snapshot.durations[name]
    words = []
    for share in (0.5, 0.9, 0.99):
        seconds = held.quantile(share)
        if seconds is None:
            return ["none yet"]
        text = f"{seconds * 1000:,.0f} ms" if seconds < 10 else f"{seconds:,.0f} s"
        if seconds == float("inf"):
            text = f"over {held.bounds[-1]:,.0f} s"
        words.append(f"p{share * 100:.0f} {text}")
    return words


def can_show() -> bool:
    """True if stdout is a terminal on which a view can be redrawn."""
    return Console().is_terminal and not Console().is_dumb_terminal


@contextmanager
def showing(llm: LLM, progress: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Show the figures of `llm` on stdout inside; a thread redraws them.

    Args:
        progress: returns the lines done and the number of all lines.
    """
    view = View()
    with Live(
        get_renderable=lambda: view.draw([take_snapshot(llm)], progress()),
        refresh_per_second=REFRESHES_PER_SECOND,
        console=Console(),
    ):
        yield


def fetch(url: str, key: str | None = None) -> str:
    """Fetch the text of a metrics endpoint, at `/metrics` if the URL has no path.

    Args:
        key: the server's `--metrics-key`, which is sent as a bearer token.

    Raises:
        InvalidRequestError: `url` is no http(s) URL, gives no response, or more than 16 MiB.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidRequestError(f"{shown(url)} is no URL such as http://localhost:9100")
    if parts.path in ("", "/"):
        url = parts._replace(path="/metrics").geturl()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, None, headers), timeout=5
        ) as answer:
            found: bytes = answer.read(MAX_METRICS_BYTES + 1)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise InvalidRequestError(
                f"{url} asks for a key: give the server's as --metrics-key"
            ) from error
        raise InvalidRequestError(f"{url} gives no metrics ({error})") from error
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"{url} gives no metrics ({error}): does `generate --metrics-port` run there?"
        ) from error
    if len(found) > MAX_METRICS_BYTES:
        raise InvalidRequestError(f"{url} answers with more than {amount(MAX_METRICS_BYTES)}")
    return found.decode("utf-8", errors="replace")


def watch(url: str, interval: float, key: str | None = None) -> int:
    """Show an endpoint's figures until it is gone or Ctrl-C, or once if stdout is no terminal.

    Raises:
        InvalidRequestError, CorruptFileError: the first fetch fails, or has none of this package's
            metrics.
    """
    from spectral_paged.metrics.prometheus import parse

    console, view = Console(), View()
    snapshots = parse(fetch(url, key))
    if not can_show():
        print("stdout is no terminal: one reading, and no updates", file=sys.stderr)
        console.print(view.draw(snapshots))
        return 0
    try:
        with Live(view.draw(snapshots), console=console, auto_refresh=False) as screen:
            while True:
                time.sleep(interval)
                screen.update(view.draw(parse(fetch(url, key))), refresh=True)
    except KeyboardInterrupt:
        return 0
    except SpectralPagedError as error:
        print(f"no reading any more, so the run has ended: {error}", file=sys.stderr)
        return 0
