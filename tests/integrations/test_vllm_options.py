"""The options of pages inside vLLM; the plug-in itself runs in `vllm_host_cases.py`."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_paged.cli import main
from spectral_paged.errors import FormatError, InvalidRequestError, MissingPackageError
from spectral_paged.integrations.vllm import (
    PageOptions,
    check_release,
    engine_args,
    serve_flags,
)
from spectral_paged.integrations.vllm.releases import TRIED

SOME = {
    "kv_format": "exact",
    "calibration": Path("basis.safetensors"),
    "prefill_segment": 1024,
    "exempt_layers": [0, 5],
}


def test_the_options_travel_in_the_additional_config():
    args = engine_args(max_num_seqs=32, additional_config={"mine": 1}, dtype="bfloat16", **SOME)
    assert args["additional_config"]["mine"] == 1 and args["dtype"] == "bfloat16"
    assert PageOptions.of(args["additional_config"]) == PageOptions(
        kv_format="exact",
        calibration="basis.safetensors",
        prefill_segment=1024,
        exempt_layers=(0, 5),
    )
    assert args["num_gpu_blocks_override"] > args["max_num_seqs"] == 32
    assert PageOptions.of({}) == PageOptions.of(None) == PageOptions()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"kv_format": "spectral"}, FormatError, "spectral-quality"),
        ({"kv_format": 7}, FormatError, "kv_format"),
        ({"prefill_segment": "2k"}, InvalidRequestError, "prefill_segment"),
        ({"exempt_layers": "0"}, InvalidRequestError, "exempt_layers"),
        ({"exempt_layers": [-1]}, InvalidRequestError, "exempt_layers"),
        ({"exempt_layers": [True]}, InvalidRequestError, "exempt_layers"),
        ({"kv_host_memory": 1.5}, InvalidRequestError, "kv_host_memory.*32GiB"),
        ({"kv_host_memory": True}, InvalidRequestError, "kv_host_memory"),
        ({"kv_store": 7}, InvalidRequestError, "kv_store"),
        ({"kv_store_size": [1]}, InvalidRequestError, "kv_store_size"),
    ],
)
def test_a_value_that_is_not_served_is_refused_at_every_door(options, error, words):
    doors = (
        lambda: engine_args(**options),
        lambda: serve_flags("model", **options),
        lambda: PageOptions.of({"spectral_paged": options}),
    )
    for door in doors:
        with pytest.raises(error, match=words):
            door()


@pytest.mark.parametrize("store", [{"kv_host_memory": "32GiB"}, {"kv_store": Path("pages")}])
def test_a_store_is_one_argument(store):
    args = engine_args(**store)
    (name,) = store
    assert PageOptions.of(args["additional_config"]).keeps
    assert args["additional_config"]["spectral_paged"] == {name: str(store[name])}
    assert not PageOptions().keeps


def test_an_option_that_does_not_exist_is_refused_with_its_neighbour():
    with pytest.raises(InvalidRequestError, match="did you mean 'kv_format'"):
        PageOptions.of({"spectral_paged": {"kv_fromat": "exact"}})
    with pytest.raises(InvalidRequestError, match="give an object"):
        PageOptions.of({"spectral_paged": "exact"})


def test_what_pages_set_themselves_cannot_be_set():
    with pytest.raises(TypeError, match="worker_cls"):
        engine_args(worker_cls="mine")


def test_no_flag_needs_quotes():
    flags = serve_flags("org/model", max_num_seqs=64, **SOME)
    assert not set("".join(flags)) & set(" '\"$`\\&|;<>(){}*?")


def test_the_command_prints_the_flags(capsys):
    assert main(["vllm-args", "org/model", "--kv-format", "exact", "--exempt-layers", "0"]) == 0
    want = serve_flags("org/model", kv_format="exact", exempt_layers=(0,))
    assert capsys.readouterr().out.split() == want


def test_the_command_refuses_what_a_shell_would_cut(capsys):
    assert main(["vllm-args", "my model"]) == 2
    assert "space" in capsys.readouterr().err


@pytest.mark.parametrize("found", [TRIED[-1], f"{TRIED[-1]}+cu130"])
def test_tried_releases_pass(monkeypatch, found):
    monkeypatch.setattr("spectral_paged.integrations.vllm.releases.version", lambda name: found)
    check_release()


@pytest.mark.parametrize("found", ["0.25.1", "0.33.0", "0.26.1", None])
def test_other_releases_are_refused_with_the_tried_ones(monkeypatch, found):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr("spectral_paged.integrations.vllm.releases.version", version)
    with pytest.raises(MissingPackageError, match=TRIED[-1]):
        check_release()


def test_the_entry_point_is_the_function_that_vllm_calls():
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    [point] = [p for p in points if p.name == "spectral_paged"]
    assert point.value == "spectral_paged.integrations.vllm:register"


def test_the_face_needs_no_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from spectral_paged.integrations.vllm import engine_args\n"
        "engine_args()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
