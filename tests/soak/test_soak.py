"""Every part of the soak runs, reports its figures, and fails if something is wrong."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from spectral_paged.cache import encoder
from spectral_paged.pool.slot_pool import SlotPool

FOLDER = pathlib.Path(__file__).parent


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("soak_main", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(text):
    """Figures by name, read from the printed table of one part."""
    lines = [line.rsplit("  ", 1) for line in text.splitlines()[1:]]
    return {name.strip(): value.strip().replace(",", "") for name, value in lines}


PARTS = [
    (["--only", "pool", "--operations", "3000"], "operations", 3000),
    (["--only", "engine", "--minutes", "0.03"], "steps", 100),
    (["--only", "model", "--minutes", "0.05"], "steps", 50),
]


@pytest.mark.parametrize("arguments, name, least", PARTS, ids=["pool", "engine", "model"])
def test_a_short_soak_finds_nothing_and_says_how_much_it_did(soak, capsys, arguments, name, least):
    assert soak.main(arguments) == 0
    found = figures(capsys.readouterr().out)
    assert int(found[name]) >= least
    wrong = {p: found.get(p, "0") for p in soak.PROBLEMS}
    assert set(wrong.values()) == {"0"} and "integrity" in found


def keep_cached(monkeypatch):
    monkeypatch.setattr(SlotPool, "drop_cached", lambda self: 0)


def skip_pages(monkeypatch):
    monkeypatch.setattr(encoder, "put_units", lambda planes, units, pages: None)


@pytest.mark.parametrize(
    "spoil, arguments, problem",
    [(keep_cached, 0, "integrity"), (skip_pages, 1, "stale"), (skip_pages, 2, "failed")],
    ids=["pool", "engine", "model"],
)
def test_what_is_wrong_is_counted_and_fails_the_soak(
    soak, capsys, monkeypatch, spoil, arguments, problem
):
    spoil(monkeypatch)
    seconds = ["--minutes", "0.08"] if arguments else []
    assert soak.main([*PARTS[arguments][0], *seconds]) == 1
    assert int(figures(capsys.readouterr().out)[problem]) > 0


def test_memory_that_grows_after_the_warm_up_is_seen(soak):
    from model_soak import growth_bytes

    assert growth_bytes([0, 90, 100, 100, 101, 99, 100, 100]) == 0
    assert growth_bytes([100, 100, 200, 200, 300, 300, 400, 400]) == 200
