"""A wrong option is refused before weights are opened, downloaded or converted, at every door."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import LLM, CacheOptions, PageFormat
from spectral_paged.batch.file import OutputFile
from spectral_paged.cli.commands import main
from spectral_paged.errors import (
    CapacityError,
    CorruptFileError,
    FormatError,
    InvalidRequestError,
    SpectralPagedError,
)
from spectral_paged.models import loader
from support.page_parts import toy_basis
from support.tiny_model import tiny_llm, tiny_model


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("models") / "explodes"
    tiny_model().config.save_pretrained(where)
    (where / "model.safetensors").write_text("these are no weights")
    toy_basis(2, 2, 64).save(where.parent / "others.safetensors")
    (where.parent / "damaged.safetensors").write_text("no calibration")
    return where


@pytest.fixture
def folder(config_folder, monkeypatch):
    """A model whose weights end the test when anybody opens them, in the working folder."""
    opened = lambda *a, **o: pytest.fail("weights are opened")  # noqa: E731
    for name in ("check_checkpoint", "convert_gguf"):
        monkeypatch.setattr(loader, name, opened)
    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", opened)
    monkeypatch.chdir(config_folder.parent)
    return str(config_folder)


def by_llm(model, options):
    with pytest.raises(SpectralPagedError) as caught:
        LLM(model, **{"device": "cpu"} | options)
    return caught.value


def by_options(model, options):
    """Those of a cache, as an object."""
    cached = {k: v for k, v in options.items() if k in CacheOptions.__dataclass_fields__}
    with pytest.raises(SpectralPagedError) as caught:
        others = {k: v for k, v in options.items() if k not in cached}
        LLM(model, device="cpu", cache_options=CacheOptions(**cached), **others)
    return caught.value


def by_ray(model, options, folder=None):
    ray = pytest.importorskip("spectral_paged.integrations.ray")
    output = OutputFile(f"{model}.out")
    try:
        with pytest.raises(SpectralPagedError) as caught:
            ray.run_batch(model, "none.jsonl", output, {}, options=options)
    finally:
        output.close()
    assert not ray.ray.is_initialized(), "no cluster is joined"
    return caught.value


ANY = {  # wrong for every model, so not even its config is looked for
    "a misspelled preset": (
        {"kv_format": "spectral-qualty"},
        FormatError,
        "did you mean 'spectral-quality'.*presets are 'auto', 'exact'",
    ),
    "no preset at all": ({"kv_format": "fp8"}, FormatError, "unknown kv_format 'fp8'"),
    "a number": ({"kv_format": 8}, FormatError, "give a preset name or a PageFormat"),
    "None": ({"kv_format": None}, FormatError, "give a preset name or a PageFormat"),
    "a segment of 100": ({"prefill_segment": 100}, FormatError, "multiple of 512"),
    "no segment": ({"prefill_segment": 0}, FormatError, "prefill_segment=0"),
    "a segment of text": ({"prefill_segment": "2k"}, InvalidRequestError, "must be an integer"),
    "a dtype": ({"dtype": "int4"}, InvalidRequestError, "dtype is 'int4'; use 'auto' or one of"),
    "torch's int8": ({"dtype": torch.int8}, InvalidRequestError, "use 'auto' or one of"),
    "a share above 1": ({"gpu_memory_utilization": 90}, InvalidRequestError, r"in \(0, 1\]"),
    "a share of text": ({"gpu_memory_utilization": "90%"}, InvalidRequestError, r"in \(0, 1\]"),
    "no tokens": ({"max_num_batched_tokens": 0}, InvalidRequestError, "integer of at least 1"),
    "no sequences": ({"max_num_seqs": 0}, InvalidRequestError, "integer of at least 1"),
    "bytes of a float": ({"kv_cache_bytes": 0.5 * 2**30}, InvalidRequestError, "an integer"),
    "bytes of text": ({"kv_cache_bytes": "4GiB"}, InvalidRequestError, "must be an integer"),
    "a length of text": ({"max_model_len": "32k"}, InvalidRequestError, "must be an integer"),
    "layers of text": ({"exempt_layers": "0,1"}, InvalidRequestError, "a list of whole numbers"),
    "a flag of text": ({"enable_prefix_caching": "no"}, InvalidRequestError, "True or False"),
    "a seed of text": ({"seed": "x"}, InvalidRequestError, "seed is 'x'; it must be an integer"),
    "a generation config": ({"generation_config": "vLLM"}, InvalidRequestError, "'auto' .*'none'"),
    "no calibration file": ({"calibration": "gone"}, InvalidRequestError, "no calibration file"),
    "a calibration of 3": ({"calibration": 3}, InvalidRequestError, "a path or a SharedBasis"),
}
SHARED = PageFormat("s", 2, 16, ((16, 4),), ((16, 4),), basis="shared")
THIS = {  # wrong for this model, which its config says
    "another geometry": (
        {"kv_format": PageFormat("s", 3, 16, ((16, 4),), ((16, 4),))},
        FormatError,
        "for 3 KV heads of width 16; the model has 2 of 16",
    ),
    "bytes for nothing": ({"kv_cache_bytes": 1000}, CapacityError, "give kv_cache_bytes >= "),
    "a layer too many": ({"exempt_layers": [0, 7]}, FormatError, r"\[7\] do not exist"),
    "too long": ({"max_model_len": 10**9}, InvalidRequestError, "this model takes 2 to"),
    "another calibration": (
        {"kv_format": SHARED, "calibration": "others.safetensors"},
        FormatError,
        "is of 2 KV heads of width 64; format 's' has 2 of 16",
    ),
    "a damaged calibration": (
        {"kv_format": SHARED, "calibration": "damaged.safetensors"},
        CorruptFileError,
        "is no calibration or is damaged",
    ),
    "weights online": ({"calibration": "online"}, FormatError, "weights of a real calibration"),
    "no calibration": ({"calibration": None}, FormatError, "needs a calibration"),
}


@pytest.mark.parametrize("door", [by_llm, by_options, by_ray])
@pytest.mark.parametrize("case", ANY)
def test_a_value_that_no_model_takes_is_refused_first_of_all(folder, monkeypatch, door, case):
    options, kind, says = ANY[case]
    monkeypatch.setattr(loader, "resolve", lambda *_: pytest.fail("a model is looked for"))
    error = door(folder, options)
    assert type(error) is kind
    with pytest.raises(kind, match=says):
        raise error


@pytest.mark.parametrize("door", [by_llm, by_options])
@pytest.mark.parametrize("case", THIS)
def test_a_value_that_this_model_does_not_take_is_refused_by_its_config(folder, door, case):
    options, kind, says = THIS[case]
    error = door(folder, options)
    assert type(error) is kind
    with pytest.raises(kind, match=says):
        raise error


@pytest.mark.parametrize("command", ["generate", "serve"])
@pytest.mark.parametrize(
    "option, value, says",
    [
        ("--kv-format", "spectral-qualty", "did you mean 'spectral-quality'"),
        ("--dtype", "int4", "dtype is 'int4'"),
        ("--calibration", "gone", "there is no calibration file 'gone'"),
        ("--prefill-segment", "100", "multiple of 512"),
        ("--gpu-memory-utilization", "1.5", "must be in (0, 1]"),
        ("--max-model-len", "1000000", "this model takes 2 to"),
        ("--kv-cache-bytes", "1KiB", "give kv_cache_bytes >= "),
    ],
)
def test_commands_refuse_a_wrong_option_first(
    folder, tmp_path, capsys, command, option, value, says
):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}')
    where = {
        "generate": ["--model", folder, "--input", str(source), "--output", str(source) + ".out"],
        "serve": [folder, "--port", "0"],
    }
    assert main([command, *where[command], "--device", "cpu", option, value]) == 2
    assert says in capsys.readouterr().err


def test_a_gguf_file_is_not_converted_for_a_wrong_option(folder, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="unknown kv_format"):
        LLM(path, kv_format="spectral")


def test_what_is_right_reaches_the_weights(folder):
    """The traps are there: without a wrong option they spring."""
    with pytest.raises(pytest.fail.Exception, match="weights are opened"):
        LLM(folder, device="cpu", kv_format="exact", kv_cache_bytes=16 << 20)


@pytest.mark.parametrize("exempt", [(), (0,), (1, 0)])
@pytest.mark.parametrize("bytes_", [0, 3_000, 100_000, 200_000, 300_000, 400_000, 600_000])
def test_the_check_before_and_the_cache_itself_agree_on_bytes(folder, bytes_, exempt):
    """The same bytes are too few for both, with a remedy that is one."""
    options = {"kv_cache_bytes": bytes_, "exempt_layers": exempt, "max_num_seqs": 4}
    format = PageFormat.preset("spectral-int8", num_kv_heads=2, head_dim=16)
    told = []
    for make in (
        lambda: LLM(folder, device="cpu", kv_format="spectral-int8", **options),
        lambda: tiny_llm(
            PageFormat.preset("spectral-int8", num_kv_heads=2, head_dim=16), **options
        ),
    ):
        try:
            make()
            told.append("enough")
        except pytest.fail.Exception:
            told.append("enough")
        except CapacityError as error:
            told.append(str(error))
    assert told[0] == told[1]
    if told[0] != "enough" and bytes_:
        need = int(told[0].rsplit(">= ", 1)[1])
        assert bytes_ < need < 1_000_000
        tiny_llm(format, **options | {"kv_cache_bytes": need})


def test_numpys_integers_are_numbers():
    np = pytest.importorskip("numpy")
    options = CacheOptions(kv_cache_bytes=np.int64(1 << 24), max_num_seqs=torch.tensor(3))
    assert options == CacheOptions(kv_cache_bytes=1 << 24, max_num_seqs=3)
    assert type(options.kv_cache_bytes) is type(options.max_num_seqs) is int
