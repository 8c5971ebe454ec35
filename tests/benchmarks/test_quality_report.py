"""The report of `bench quality` shows the sections that it has data for, and no others."""

from __future__ import annotations

import math

from spectral_paged.benchmarks.quality import judge, layers, plots, report, summary, tasks
from spectral_paged.benchmarks.quality.journal import Journal
from support.copying_replay import HARD, MILD, CopyingReplay, haystack, quiet, windows

TITLES = {
    "Divergence from the exact cache",
    "Needles",
    "Tasks with exact answers",
    "Longer contexts",
    "Prefill over pages",
    "Sensitivity of layers",
    "Storage with landmarks and tail",
    "Free generation",
    "Ranks",
    "Needles by depth and kind",
}


def full_results():
    replay, journal, hay, methods = CopyingReplay(), Journal(None, "m"), haystack(), [MILD, HARD]
    shared = {"journal": journal, "progress": quiet}
    judge.judge_continuation(replay, methods, windows(2), **shared)
    longer = tasks.continuation_windows(hay, 2048, 2, 16)
    judge.judge_continuation(replay, methods, longer, **shared)
    judge.judge_continuation(replay, methods, windows(2)[:1], segment=512, **shared)
    judge.judge_needles(replay, methods, hay, [1024, 2048], max_rounds=1, **shared)
    judge.judge_tasks(replay, methods, hay, [1024], max_rounds=1, **shared)
    judge.judge_generation(
        replay, methods, tasks.generation_prompts(hay, (500,), 1), num_tokens=20, **shared
    )
    layers.judge_sensitivity(replay, [MILD], windows(2), **shared)
    groups = [{"title": "Ranks", "text": "Two ranks.", "methods": ["mild", "hard"]}]
    return summary.aggregate(
        journal.used(), model="copying", head_dim=16, comparisons=groups, notes=["c4: not run"]
    )


def test_layers_that_cost_over_three_times_the_mean_are_proposed_for_exemption():
    from spectral_paged.benchmarks.quality.layer_sections import proposed_exempt

    assert proposed_exempt([1.0, 1.0, 1.0, 1.0]) == ([], 0.0)
    chosen, part = proposed_exempt([0.1, 5.0, 0.1, 0.1, None, 0.1])
    assert chosen == [1] and 0.9 < part < 1
    assert proposed_exempt([0.0, 0.0]) == ([], 0.0)


def test_every_section_with_data_is_written_with_its_picture(tmp_path):
    results = full_results()
    assert {s.title for s in report.sections(results)} == TITLES
    files = report.write_report(results, tmp_path / "quality.md")
    text = files[0].read_text()
    assert all(f"## {title}" in text for title in TITLES)
    assert "- c4: not run" in text
    pictures = [f for f in files if f.suffix == ".png"]
    assert len(pictures) == 4
    assert all(p.stat().st_size > 5000 and p.name in text for p in pictures)


def test_tables_have_as_many_cells_as_columns():
    for section in report.sections(full_results()):
        assert all(len(row) == len(section.columns) for row in section.rows), section.title


def test_without_data_there_is_no_section(tmp_path):
    results = summary.aggregate([], model="none", head_dim=16)
    assert report.sections(results) == []
    assert report.write_report(results, tmp_path / "r.md") == [tmp_path / "r.md"]


def test_segments_do_not_count_in_the_main_table():
    results = full_results()
    assert results["overall"]["exact"]["windows"] == 4
    assert {c["segment"] for c in results["continuation"]} == {None, 512}


def test_prefill_over_pages_is_compared_on_the_same_windows():
    (cell,) = (c for c in full_results()["continuation"] if c["segment"])
    assert cell["methods"]["mild"]["windows"] == cell["exact_prefill"]["mild"]["windows"] == 1
    assert cell["methods"]["mild"]["kl"] > cell["exact_prefill"]["mild"]["kl"]


def test_reconstruction_shows_random_matrices_apart(tmp_path):
    told = {"family": "int", "landmarks": 64, "bytes_per_token": 8.0, "ratio": 4.0}
    errors = {"k": [0.1, 0.2], "v": [0.2, 0.2], "random_k": [0.9, 0.9], "random_v": [0.9, None]}
    results = {"methods": {}, "reconstruction": {"r": {**told, **errors}}}
    (section,) = report.sections(results)
    assert section.rows == [["r", "4.00x", "0.150", "0.200", "0.900", "not finite"]]
    section.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_a_needle_map_has_a_cell_for_every_depth_and_length():
    by_length = {"1024": {"0.25": [1, 2]}, "512": {"0.75": [3, 3]}}
    grid = plots.depth_grid(by_length, ["0.25", "0.75"], ["512", "1024"])
    assert grid[0][1] == 0.5 and grid[1][0] == 1.0
    assert math.isnan(grid[0][0])
    assert plots.added([by_length, by_length])["512"]["0.75"] == [6, 6]
