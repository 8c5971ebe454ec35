"""Replaced functions stay while a model needs them, and not longer; without Unsloth itself."""

from __future__ import annotations

import itertools
import types

import pytest

from spectral_paged.integrations import patching
from spectral_paged.integrations.unsloth import attention
from spectral_paged.integrations.unsloth.attention import FunctionPatches
from support.at_a_line import at_a_line

NAMES = "run_attention", "slow_attention_softcapping", "LlamaAttention_fast_forward_inference"


class Model:
    """A model; only its identity counts."""


@pytest.fixture
def module(monkeypatch):
    """A module that stands for those of Unsloth."""
    made = types.ModuleType("fakelib")
    exec("".join(f"def {name}(): ...\n" for name in NAMES), vars(made))
    monkeypatch.setattr(attention, "fast_modules", lambda: [made])
    monkeypatch.setattr(attention, "fast_functions", lambda: {n: vars(made)[n] for n in NAMES})
    return made


def replaced(module):
    """The functions that are replaced now."""
    return [name for name in NAMES if hasattr(vars(module)[name], "__wrapped__")]


@pytest.mark.parametrize(("call", "num_before"), [("install", 1), ("release", 1), ("release", 0)])
def test_a_model_that_is_collected_at_any_line_changes_nothing_for_another(
    call, num_before, module
):
    """What is collected may be the patch of a model that does not count any more."""
    for line in itertools.count():
        functions, models, other = FunctionPatches(), [Model()], Model()
        for model in (*models[:num_before], *[other] * (call == "release")):
            functions.install(model)
        del model

        def collect(functions=functions, models=models):
            models.clear()
            functions.remove_unused()  # as the finalizer of its patch does

        with at_a_line(line, collect, attention, patching) as done:
            getattr(functions, call)(other)
        if not done:
            collect()
        assert replaced(module) == (list(NAMES) if call == "install" else [])
        functions.release(other)
        assert not replaced(module) and not patching._active
        if not done:
            break
    assert line >= (3 if num_before and call == "release" else 20)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_install_that_fails_needs_nothing(call, module, monkeypatch):
    functions, first, second = FunctionPatches(), Model(), Model()
    calls, before = itertools.count(1), attention.replace_everywhere

    def failing(*args, **kwargs):
        if next(calls) == call:
            raise MemoryError
        return before(*args, **kwargs)

    for _ in range(2):  # with no model before it, and with one
        with monkeypatch.context() as context:
            calls = itertools.count(1)
            context.setattr(attention, "replace_everywhere", failing)
            with pytest.raises(MemoryError) as held:
                functions.install(second)
        assert len(replaced(module)) in (0, len(NAMES)) and held
        functions.release(first)
        assert not replaced(module)
        functions.install(first)
    functions.release(first)
    assert not replaced(module)
