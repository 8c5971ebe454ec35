"""The table of GPUs says what the code decides for each kind of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spectral_paged import PageFormat
from spectral_paged.device import choose_dtype
from spectral_paged.kernels.chunk import fa3, gpu as chunk_gpu, varlen, xformers
from spectral_paged.kernels.chunk.backend import ChunkKind
from spectral_paged.kernels.decode.gpu import implementation
from spectral_paged.kernels.launch.card import OLDEST, Card
from spectral_paged.kernels.seal.triton import seal
from support.cards import CARDS, SOLD_AS, stand_on
from support.markdown_pages import BY_NAME, table

PAGE = "docs/gpus.md"
HEADER = [
    "kind",
    "GPUs",
    "`dtype=auto`",
    "shared memory",
    "decode, `spectral-quality`",
    "decode, `spectral-int8`",
    "prompts",
    "state",
]
RUN_ON = {"sm_90"}  # kinds on which the suite and benchmarks have run
CUDA = torch.device("cuda")


@pytest.fixture
def on(monkeypatch):
    """Lets the code run as on a GPU of a kind, with torch alone or with fa3-fwd."""

    def enter(kind):
        card = CARDS[kind]
        stand_on(card, monkeypatch.setattr)
        monkeypatch.setattr("spectral_paged.device.placement.check_card", lambda device: None)
        monkeypatch.setattr(xformers, "_has_operator", lambda: False)
        for module in (fa3, varlen):
            monkeypatch.setattr(module, "capability", lambda device: card.capability)

    return enter


def prompts(monkeypatch, dtype):
    """The backend of prompt chunks of width 128: with fa3-fwd, and without where that differs."""
    found = []
    halves = (torch.float16, torch.bfloat16)
    for build in (fa3.Build("fa3-fwd", lambda *_: None, halves), None):
        monkeypatch.setattr(fa3, "build_in_use", lambda build=build: build)
        found.append(chunk_gpu.backend(ChunkKind(dtype, 128, CUDA)))
    return ", else ".join(f"`{name}`" for name in dict.fromkeys(found))


def decode(name, dim):
    layout = PageFormat.preset(name, num_kv_heads=1, head_dim=dim).layout
    return implementation(layout, 4, CUDA)


def both(name, dims=(64, 128, 256)):
    """The decode backends of a preset by head width: `gluon` (64, 128), `triton` (256)."""
    found = {}
    for dim in dims:
        found.setdefault(decode(name, dim), []).append(str(dim))
    return ", ".join(f"`{backend}` ({', '.join(dims)})" for backend, dims in found.items())


def test_the_table_of_gpus_is_what_the_code_decides(on, monkeypatch):
    want = {}
    for kind, card in CARDS.items():
        on(kind)
        dtype = choose_dtype("auto", CUDA)
        want[f"`{kind}`"] = [
            SOLD_AS[kind],
            str(dtype).removeprefix("torch."),
            f"{card.shared_bytes // 1024} KiB",
            both("spectral-quality"),
            both("spectral-int8", (64, 128)),
            prompts(monkeypatch, dtype),
            "run" if kind in RUN_ON else "compiled only",
        ]
    said = {first: others for first, *others in table(PAGE, HEADER)}
    assert said == want


def test_the_page_names_the_oldest_gpu():
    assert "compute capability {}.{}".format(*OLDEST) in BY_NAME[PAGE].text


@pytest.mark.parametrize("kind", CARDS)
def test_tiles_exist_for_every_width_on_every_kind_of_gpu(kind):
    """`make check-builds` compiles them; a tile that cannot fit raises."""
    for dim in (64, 128, 256):
        for rank in (16, 32, 64, 128, 256):
            rows, columns = seal._projection_tile(dim, rank, 64, CARDS[kind])
            assert rows >= 16 and columns >= 16


def test_a_tile_that_cannot_fit_is_refused():
    tiny = dataclasses.replace(CARDS["sm_75"], shared_bytes=4096)
    assert isinstance(tiny, Card)
    with pytest.raises(ValueError, match="does not fit"):
        seal._projection_tile(256, 256, 64, tiny)
