"""A layer's spec is its rotation and its window, by which layers of one model may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spectral_paged.errors import FormatError
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable

Ropes = RotaryTable | Sequence[RotaryTable | None] | None
Windows = int | Sequence[int | None] | None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's rotary table (None: it rotates nothing) and its window, the number of tokens that
    a query sees, its own included (None: all tokens)."""

    rope: RotaryTable | None
    window: int | None = None


def reached_windows(windows: Sequence[int | None], longest: int) -> list[int | None]:
    """The windows, with None for those that no sequence of up to `longest` tokens reaches."""
    return [window if window is not None and window < longest else None for window in windows]


def layer_specs(
    format: PageFormat,
    num_layers: int,
    rope: Ropes,
    windows: Windows,
    *,
    max_model_len: int | None,
    device: torch.device,
) -> tuple[list[LayerSpec], int]:
    """Every layer's spec, with tables on `device`, and the longest sequence in tokens.

    That length is `max_model_len`, or by default the shortest table's length.

    Raises:
        FormatError: the format turns keys back but there is no table, a table is too short, a list
            does not have one entry a layer, or a window has no tokens.
    """
    if rope is None and format.seals and format.rope != "post":
        raise FormatError(
            f"rope={format.rope!r} formats turn keys back: pass the model's RotaryTable, or a list "
            "with one for each layer (None for a layer that rotates nothing)"
        )
    ropes = [rope] * num_layers if rope is None or isinstance(rope, RotaryTable) else list(rope)
    spans = [windows] * num_layers if windows is None or isinstance(windows, int) else [*windows]
    for name, given in (("rope", ropes), ("sliding_windows", spans)):
        if len(given) != num_layers:
            raise FormatError(
                f"{name} has {len(given)} entries; the model has {num_layers} layers: give one for "
                "all, or one each"
            )
    bad = [window for window in spans if window is not None and window < 1]
    if bad:
        raise FormatError(f"a sliding window of {bad[0]} tokens: give 1 or more, or None for all")
    tables = {table: table.to(device) for table in ropes if table is not None}
    shortest = min((table.max_positions for table in tables), default=None)
    longest = shortest if max_model_len is None else max_model_len
    if longest is None:
        raise FormatError("max_model_len must be given where there is no rotary table")
    if shortest is not None and shortest < longest:
        raise FormatError(
            f"a rotary table has {shortest} positions, max_model_len is {longest}: build the table "
            "longer or lower max_model_len"
        )
    spans = reached_windows(spans, longest)
    placed = [None if table is None else tables[table] for table in ropes]
    return [LayerSpec(r, w) for r, w in zip(placed, spans, strict=True)], longest
