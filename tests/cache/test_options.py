"""Options of a cache are defined once, and taken by name or as an object wherever one is made."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
from typing import Any, get_type_hints

import pytest
import torch

from spectral_paged import LLM, CacheOptions, SpectralKVCache
from spectral_paged.conformance import AdapterConfig
from spectral_paged.integrations.transformers_cache import SpectralPagedCache
from spectral_paged.integrations.unsloth import patch_unsloth_attention
from spectral_paged.options import (
    CacheOptionsDict,
    LLMOptions,
    LLMOptionsDict,
    add_options,
    given_options,
)
from spectral_paged.pages import PageFormat, SharedBasis
from support import cache_feed
from support.paths import ROOT
from support.tiny_model import tiny_model

DOORS = [LLM, SpectralKVCache, SpectralPagedCache, patch_unsloth_attention]
EVERY_DOOR = pytest.mark.parametrize("door", DOORS, ids=lambda d: d.__name__)
FIELDS = {field.name: field.default for field in dataclasses.fields(CacheOptions)}
OTHERS = {
    "kv_cache_bytes": 3 << 20,
    "max_num_seqs": 5,
    "max_model_len": 700,
    "exempt_layers": (1,),
    "calibration": "online",
    "enable_prefix_caching": False,
    "disable_cascade_attn": False,
    "kv_host_memory": 1 << 30,
    "kv_store": "folder",
    "kv_store_size": 1 << 30,
    "model_fingerprint": "mine",
    "debug_poison": True,
}


def required(door):
    """Arguments that Python itself asks for."""
    taken = inspect.signature(door).parameters.values()
    return {
        p.name: None
        for p in taken
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


# ---- one list, one set of defaults ----------------------------------------------------------


@pytest.mark.parametrize(
    "keywords, options", [(CacheOptionsDict, CacheOptions), (LLMOptionsDict, LLMOptions)]
)
def test_keywords_are_the_fields(keywords, options):
    names = {"torch": torch, "PageFormat": PageFormat, "SharedBasis": SharedBasis}
    assert get_type_hints(keywords, localns=names) == get_type_hints(options, localns=names)
    assert not keywords.__required_keys__, "each has a default"


@EVERY_DOOR
def test_a_door_spells_no_option_and_so_has_no_default_of_its_own(door):
    taken = inspect.signature(door).parameters
    assert not FIELDS.keys() & taken.keys()
    assert taken["cache_options"].default is None
    assert any(p.kind is p.VAR_KEYWORD for p in taken.values())


def test_the_conformance_kit_hands_on_the_object():
    taken = {field.name for field in dataclasses.fields(AdapterConfig)}
    assert "cache_options" in taken and not FIELDS.keys() & taken


def test_the_command_line_leaves_defaults_to_the_llm():
    parser = argparse.ArgumentParser()
    add_options(parser, LLMOptions)
    assert given_options(parser.parse_args([]), LLMOptions) == {}
    sizes = "--kv-cache-bytes 2KiB --max-num-seqs 3 --max-model-len 9 --seed 4"
    others = "--no-prefix-caching --calibration online --trust-remote-code"
    given = given_options(parser.parse_args([*sizes.split(), *others.split()]), LLMOptions)
    assert given == {
        "kv_cache_bytes": 2048,
        "max_num_seqs": 3,
        "max_model_len": 9,
        "enable_prefix_caching": False,
        "calibration": "online",
        "seed": 4,
        "trust_remote_code": True,
    }
    assert given.keys() <= {field.name for field in dataclasses.fields(LLMOptions)}


@pytest.mark.parametrize("folder", ["spectral_paged", "benchmarks"])
def test_no_signature_spells_them_again(folder):
    """Two of them are arguments of arithmetic; from three on it is the list again."""
    found, poisons = [], set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]}
                if len(names & FIELDS.keys()) > 2:
                    found.append(f"{path.name}:{node.name}")
                if any("poison" in name for name in names):
                    poisons.add(path.name)
    assert found == []
    assert poisons <= {"arena.py", "memory.py"}, (
        "a debug option of a cache, and of the memory that does it"
    )


# ---- what a call means ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_means_the_same_by_name_and_in_an_object(name):
    one = {name: OTHERS[name]}
    named = CacheOptions.of(LLM, None, one)
    assert named == CacheOptions.of(LLM, CacheOptions(**one), {}) == CacheOptions(**one)
    assert named != CacheOptions.of(LLM, None, {}) == CacheOptions()


@pytest.mark.parametrize("text, size", [("1GiB", 1 << 30), ("2g", 2 * 10**9), ("77", 77)])
def test_an_amount_of_memory_may_be_a_text(text, size):
    assert CacheOptions.of(LLM, None, {"kv_host_memory": text}).kv_host_memory == size


def test_what_is_named_wins_over_the_object():
    given = CacheOptions(max_num_seqs=3, max_model_len=70)
    chosen = CacheOptions.of(LLM, given, {"max_num_seqs": 4})
    assert (chosen.max_num_seqs, chosen.max_model_len) == (4, 70)
    assert given.max_num_seqs == 3


@pytest.mark.parametrize(
    "typo, meant",
    [("kv_cache_byte", "kv_cache_bytes"), ("poison", "debug_poison"), ("colour", None)],
)
@EVERY_DOOR
def test_an_unknown_name_is_refused_with_those_that_there_are(door, typo, meant):
    with pytest.raises(TypeError) as caught:
        door(**required(door), **{typo: 1})
    message = str(caught.value)
    assert message.startswith(f"{door.__name__} takes no option {typo!r}")
    assert ("did you mean" in message) == (meant is not None)
    assert meant is None or f"did you mean {meant!r}?" in message
    listed = message.split("It takes ")[1].split(", ")
    assert {"kv_cache_bytes", "max_model_len", "cache_options"} <= set(listed)
    own = set(inspect.signature(door).parameters) - {"options"}
    assert own <= set(listed), "a typo of the door's own arguments ends here as well"


@pytest.mark.parametrize("door", [SpectralPagedCache, patch_unsloth_attention])
def test_what_a_door_decides_cannot_be_named_and_wins_over_the_object(door):
    with pytest.raises(TypeError, match="takes no option 'enable_prefix_caching'") as caught:
        door(**required(door), enable_prefix_caching=True)
    assert "enable_prefix_caching" not in str(caught.value).split("It takes ")[1]
    fixed: dict[str, Any] = {"enable_prefix_caching": False}
    assert not CacheOptions.of(door, CacheOptions(), {}, **fixed).enable_prefix_caching


@pytest.mark.parametrize("name", ["device", "dtype", "trust_remote_code"])
def test_a_loaded_model_takes_no_option_of_loading(name):
    with pytest.raises(TypeError, match=f"takes no {name}: the model is loaded"):
        LLM.from_model(tiny_model(), **{name: "auto"})


# ---- what comes of it -----------------------------------------------------------------------


def test_a_bare_cache_must_be_told_its_memory():
    with pytest.raises(TypeError, match="kv_cache_bytes"):
        cache_feed.make(kv_cache_bytes=None)


@pytest.mark.parametrize("as_object", [True, False])
@pytest.mark.parametrize("door", ["LLM", "SpectralPagedCache", "SpectralKVCache"])
def test_options_reach_the_cache(door, as_object):
    options: dict[str, Any] = {"kv_cache_bytes": 5 << 20, "max_num_seqs": 3, "max_model_len": 500}
    options |= {"exempt_layers": (1,), "debug_poison": True}
    given = {"cache_options": CacheOptions(**options)} if as_object else options
    if door == "LLM":
        cache = LLM.from_model(tiny_model(), kv_format="spectral-page", **given).cache
    elif door == "SpectralPagedCache":
        model = tiny_model()
        model.set_attn_implementation("spectral_paged_cache")
        cache = SpectralPagedCache(model, "spectral-page", **given).kv_cache
    else:
        cache = SpectralKVCache(
            num_layers=2,
            num_q_heads=cache_feed.HQ,
            num_kv_heads=cache_feed.H,
            head_dim=cache_feed.D,
            rope=cache_feed.ROPE,
            format=cache_feed.fmt("spectral-page"),
            **given,
        )
    assert (cache.max_num_seqs, cache.max_model_len) == (3, 500)
    assert cache.prefix_caching == (door != "SpectralPagedCache")
    sealing, exact = cache.groups
    assert (sealing.seals, exact.seals, list(exact.layers)) == (True, False, [1])
    assert 4 << 20 < sum(group.arena.num_bytes for group in cache.groups) <= 5 << 20
    assert all(int(group.arena.planes[0, 0]) == 0xFF for group in cache.groups)
