"""A function in another library is replaced at every reference, exactly, or not at all."""

from __future__ import annotations

import functools
import sys
import types

import pytest

from spectral_paged.errors import PatchError
from spectral_paged.integrations.patching import replace_everywhere

SOURCE = {
    "fakelib": "",
    "fakelib.llama": """
def attend(x):
    return ["original", x]

def factory(attention):
    def forward(x):
        return attention(x)
    return forward

forward = factory(attend)

def logged(function):
    def wrapper(x):
        return function(x)
    return wrapper

nested = logged(logged(forward))

class Layer:
    core = attend
    static = staticmethod(attend)

    def run(self, x):
        return attend(x)

    made = staticmethod(factory(attend))

def usual(x, attention=attend):
    return attention(x)

def keyword(x, *, attention=attend):
    return attention(x)

def late():
    def inner():
        return unbound
    if False:
        unbound = 1
    return inner

never_bound = late()
""",
    "fakelib.mistral": "from fakelib.llama import *\ndef decode(x):\n    return attend(x)\n",
}
CALLS = {
    "global": lambda m: m["fakelib.llama"].attend(1),
    "closure": lambda m: m["fakelib.llama"].forward(1),
    "nested closure": lambda m: m["fakelib.llama"].nested(1),
    "method": lambda m: m["fakelib.llama"].Layer().run(1),
    "class attribute": lambda m: m["fakelib.llama"].Layer.core(1),
    "static method": lambda m: m["fakelib.llama"].Layer().static(1),
    "closure in a class": lambda m: m["fakelib.llama"].Layer().made(1),
    "default": lambda m: m["fakelib.llama"].usual(1),
    "keyword default": lambda m: m["fakelib.llama"].keyword(1),
    "wildcard": lambda m: m["fakelib.mistral"].attend(1),
    "wildcard in a function": lambda m: m["fakelib.mistral"].decode(1),
    "wildcard closure": lambda m: m["fakelib.mistral"].forward(1),
}


@pytest.fixture
def lib(monkeypatch):
    """A package of modules made from `SOURCE`, by name."""
    made = {}
    for name, source in SOURCE.items():
        made[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made[name])
        exec(source, vars(made[name]))
    return made


def replacement(x):
    return ["new", x]


def everything(lib):
    """Identity of each thing the modules, the class and the closures refer to."""
    llama = lib["fakelib.llama"]
    holders = [vars(m) for m in lib.values()] + [dict(vars(llama.Layer))]
    held = [{k: id(v) for k, v in h.items()} for h in holders]
    cells = [id(c.cell_contents) for f in (llama.forward, llama.nested) for c in f.__closure__]
    return held, cells, llama.usual.__defaults__, llama.keyword.__kwdefaults__


def test_patching_the_defining_module_alone_misses_closures_and_wildcard_imports(lib):
    """The bug itself: it must stay visible in these modules, or the tests below show nothing."""
    lib["fakelib.llama"].attend = replacement
    for place in ("closure", "nested closure", "wildcard", "wildcard in a function"):
        assert CALLS[place](lib) == ["original", 1]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("place", CALLS)
def test_a_function_is_replaced_and_restored_wherever_it_is_held(lib, place, given):
    before = everything(lib)
    modules = {"modules": lib.values()} if given else {}
    with replace_everywhere(lib["fakelib.llama"].attend, replacement, **modules) as patch:
        assert CALLS[place](lib) == ["new", 1]
        names = [p.name for p in patch.places]
        assert "fakelib.mistral.attend" in names and len(set(names)) == len(names) == 8
        assert any("closure attention" in name for name in names)
    assert CALLS[place](lib) == ["original", 1] and everything(lib) == before


def test_the_replacement_may_call_the_original(lib):
    original = lib["fakelib.llama"].attend

    @functools.wraps(original)
    def around(x):
        return ["around", *original(x)]

    lib["fakelib"].around = around  # even where the search meets it
    with replace_everywhere(original, around):
        assert CALLS["closure"](lib) == CALLS["wildcard"](lib) == ["around", "original", 1]


def test_a_second_patch_of_the_same_function_is_refused(lib):
    original = lib["fakelib.llama"].attend
    patch = replace_everywhere(original, replacement)
    with pytest.raises(PatchError, match="fakelib.llama.attend is replaced already: undo"):
        replace_everywhere(original, replacement)
    patch.undo()
    patch.undo()
    with replace_everywhere(original, replacement):
        assert CALLS["wildcard"](lib) == ["new", 1]


def test_patches_on_top_of_each_other_are_undone_newest_first(lib):
    before, original = everything(lib), lib["fakelib.llama"].attend
    first = replace_everywhere(original, replacement)
    second = replace_everywhere(replacement, lambda x: ["newest", x], modules=lib.values())
    with pytest.raises(PatchError, match="fakelib.mistral.attend.*undo the later patch first"):
        first.undo()
    assert CALLS["closure"](lib) == ["newest", 1]
    second.undo()
    assert CALLS["closure"](lib) == ["new", 1]
    first.undo()
    assert everything(lib) == before


def test_a_function_that_nothing_refers_to_is_refused(lib):
    with pytest.raises(PatchError, match=r"replacement in fakelib, .*pass them"):
        replace_everywhere(replacement, print, modules=lib.values())
    with pytest.raises(PatchError, match="no module"):
        replace_everywhere(lib["fakelib.llama"].attend, replacement, modules=[])


def test_a_place_that_cannot_be_set_leaves_all_others_as_they_were(lib):
    class Sealed(type):
        def __setattr__(cls, name, value):
            raise AttributeError("sealed")

    lib["fakelib.mistral"].Last = Sealed("Last", (), {"core": lib["fakelib.llama"].attend})
    before = everything(lib)
    with pytest.raises(AttributeError, match="sealed"):
        replace_everywhere(lib["fakelib.llama"].attend, replacement)
    assert everything(lib) == before


def test_an_error_inside_the_block_still_restores(lib):
    before = everything(lib)
    with (
        pytest.raises(ZeroDivisionError),
        replace_everywhere(lib["fakelib.llama"].attend, replacement),
    ):
        raise ZeroDivisionError
    assert everything(lib) == before
