"""The command line and the package start without torch, and the package hands on its names."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import pickle
import subprocess
import sys
import tomllib

import pytest

import spectral_paged
from spectral_paged.cli.commands import build_parser
from support.paths import ROOT

HEAVY = {"torch", "transformers", "numpy", "triton"}
SECONDS = 2.0  # of a processor: 0.2 here, where torch alone takes 1.5 and transformers 5
RUN = """
import sys
from spectral_paged.cli import main
for words in {lines!r}:
    try:
        main(words)
    except SystemExit as exit:
        assert exit.code == {code}, (words, exit.code)
    else:
        raise AssertionError(words)
assert not {heavy!r} & set(sys.modules), {heavy!r} & set(sys.modules)
"""


def paths(parser, words=()):
    """The words that lead to a parser and to all below it."""
    yield list(words)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from paths(inner, [*words, name])


def run_alone(code):
    """Run code in a fresh interpreter; return its output and the processor time that it took."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    spent = after.children_user + after.children_system
    return done, spent - before.children_user - before.children_system


def test_every_help_is_printed_without_torch_and_at_once():
    lines = [[*words, "--help"] for words in paths(build_parser())]
    assert len(lines) > 15
    done, seconds = run_alone(RUN.format(lines=lines, code=0, heavy=HEAVY))
    assert done.stdout.count("usage: spectral-paged") == len(lines)
    assert seconds < SECONDS


def test_errors_of_usage_are_printed_without_torch_and_at_once():
    lines = [
        [],
        ["no-such-command"],
        ["serve"],
        ["serve", "model", "--no-such-option"],
        ["generate", "--input", "x"],
        ["generate", "--max-num-seqs", "0"],
        ["serve", "model", "--kv-cache-bytes", "much"],
        ["bench", "quality", "--length", "0"],
        ["cache", "list", "more"],
        ["serve", "model", "--tensor-parallel-size", "2"],
    ]
    done, seconds = run_alone(RUN.format(lines=lines, code=2, heavy=HEAVY))
    assert done.stderr.count("usage: spectral-paged") == len(lines)
    assert seconds < SECONDS


def test_the_version_is_that_of_the_package():
    done, seconds = run_alone(RUN.format(lines=[["--version"]], code=0, heavy=HEAVY))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout == f"spectral-paged {version}\n"
    assert spectral_paged.__version__ == version and seconds < SECONDS


# ---- the root's names -----------------------------------------------------------------------


def declared():
    """The names that a type checker sees in the root, and the module that each comes from."""
    tree = ast.parse((ROOT / "spectral_paged" / "__init__.py").read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in froms if (node.module or "").startswith("spectral_paged.")]
    return {alias.name: node.module for node in ours for alias in node.names}


def test_importing_the_package_imports_nothing_else_of_it_but_what_settles_threads():
    run_alone(
        "import sys, spectral_paged\n"
        "ours = {m for m in sys.modules if m.startswith('spectral_paged')}\n"
        "assert ours == {'spectral_paged', 'spectral_paged.cpu_threads'}"
    )


def test_public_names_are_those_of_a_type_checker():
    homes = declared()
    assert sorted(homes) == sorted(spectral_paged.__all__)
    for name, module in homes.items():
        found = getattr(spectral_paged, name)
        assert found is getattr(importlib.import_module(module), name)
        assert pickle.loads(pickle.dumps(found)) is found is copy.copy(found)
    assert {*homes, "__version__"} <= set(dir(spectral_paged))


def test_a_star_hands_on_the_public_names():
    names = {}
    exec("from spectral_paged import *", names)
    assert {name: names[name] for name in declared()} == {
        name: getattr(spectral_paged, name) for name in spectral_paged.__all__
    }


def test_modules_of_the_package_are_imported_when_they_are_asked_for():
    run_alone(
        "import sys, spectral_paged\n"
        "assert spectral_paged.errors.PoolError and spectral_paged.scheduler.Scheduler\n"
        "assert 'torch' not in sys.modules\n"
    )


@pytest.mark.parametrize("name", ["LMM", "_private", "__wrapped__", "no.dots", "", "errors.no"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(spectral_paged, name)
