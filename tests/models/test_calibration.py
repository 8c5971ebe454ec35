"""Calibration of the embedded model on real text, and the files in which an LLM finds it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectral_paged import LLM, PageFormat
from spectral_paged.errors import FormatError, InvalidRequestError
from spectral_paged.models import calibration
from spectral_paged.models.calibration import (
    averaged_over_distances,
    builtin_text,
    calibrate,
    find_calibration,
    model_fingerprint,
    output_moment,
    text_spans,
)
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import BoundBasis, SharedBasis, decode_pages, encode_pages
from spectral_paged.pages.shared_basis import COVARIANCES, METRICS, SideRows
from spectral_paged.rope import RotaryTable
from support.page_parts import toy_basis
from support.real_text import smollm2, smollm2_kv, text
from support.tiny_model import tiny_model

SHARED = PageFormat("s", 2, 16, ((16, 4),), ((16, 4),), basis="shared")


def tiny(tokenizer=None):
    model = tiny_model()
    return LoadedModel("tiny", model, tokenizer, ModelGeometry.from_config(model.config))


def by_letter(prompt):
    """A tokenizer: one token a letter."""
    return {"input_ids": [ord(c) % 199 for c in prompt]}


# ---- text --------------------------------------------------------------------------------


def test_spans_are_whole_blocks_spread_over_the_text():
    ids = list(range(10 * 1088 + 700))
    got = list(text_spans(ids, 3))
    assert [w[0] // 1088 for w in got] == [0, 3, 6] and all(len(w) == 1088 for w in got)
    assert all(w == list(range(w[0], w[0] + 1088)) for w in got)
    assert [w[0] for w in text_spans(ids, None)] == [1088 * i for i in range(10)]
    assert len(list(text_spans(ids, 99))) == 10


@pytest.mark.parametrize("count, sizes", [(576, [576]), (1087, [576]), (1088, [1088])])
def test_a_short_text_gives_what_whole_blocks_it_has(count, sizes):
    assert [len(w) for w in text_spans(range(count), None)] == sizes


@pytest.mark.parametrize("count", [0, 1, 575])
def test_a_text_without_a_whole_block_is_refused_with_the_number(count):
    with pytest.raises(InvalidRequestError, match=f"has {count} tokens; at least 576 .*--data"):
        list(text_spans(range(count), None))


def test_the_package_carries_enough_text():
    assert len(builtin_text()) > 30_000


# ---- statistics --------------------------------------------------------------------------


def test_statistics_are_those_of_the_models_own_tensors():
    """Against K, Q and V by hooks on the first layer's projections, where nothing came before."""
    loaded = tiny(by_letter)
    seen = {}
    attention = loaded.model.model.layers[0].self_attn
    for name in "qkv":
        hook = getattr(attention, f"{name}_proj").register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out[0])
        )
        seen[name] = hook
    basis = calibrate(loaded, [text("alice")[:576]])
    q, k, v = (seen[n][64:].unflatten(-1, (-1, 16)).transpose(0, 1).double() for n in "qkv")

    def covariance(x):
        x = x - x.mean(-2, keepdim=True)
        gram = x.mT @ x
        return gram / gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]

    assert basis.num_tokens == 512
    assert torch.allclose(basis.v[0].double(), covariance(v), atol=1e-4)
    assert torch.allclose(basis.k_pre[0].double(), covariance(k), atol=1e-4)
    table = RotaryTable.from_theta(10000.0, 16, max_positions=4096)
    span = torch.arange(64, 576)
    turned = table.apply(k.float().transpose(0, 1), span).transpose(0, 1).double()
    assert torch.allclose(basis.k_post[0].double(), covariance(turned), atol=1e-4)
    rows = q.unflatten(0, (2, 2)).flatten(1, 2)
    assert torch.allclose(
        basis.q_pre[0].double(),
        averaged_over_distances(rows.mT @ rows, table),
        rtol=1e-3,
        atol=1e-2,
    )


def test_queries_meet_a_key_from_every_distance():
    """The moment of R(d) u over the distances: scores of pairs come out the same either way."""
    table = RotaryTable.from_theta(10000.0, 16, max_positions=3000)
    u, error = torch.randn(40, 16), torch.randn(16)
    moment = averaged_over_distances((u.T @ u).double(), table)
    total = 0.0
    for d in torch.logspace(0, math.log2(2999), 64, base=2.0).round().long().tolist():
        turned = table.apply(u[:, None], torch.full((40,), d))[:, 0]
        total += float((turned @ error).square().sum()) / 64
    assert float(error.double() @ moment @ error.double()) == pytest.approx(total, rel=1e-4)
    assert torch.allclose(moment, moment.mT, atol=1e-6)


def test_the_output_moment_prices_an_error_of_a_value_head():
    loaded = tiny()
    moment = output_moment(loaded.model, 2, 16)
    weight = loaded.model.model.layers[1].self_attn.o_proj.weight.detach()
    error, total = torch.randn(16), 0.0
    for query_head in (2, 3):  # both read KV head 1
        placed = torch.zeros(64)
        placed[16 * query_head : 16 * (query_head + 1)] = error
        total += float((weight @ placed).square().sum())
    got = float(error.double() @ moment[1, 1] @ error.double())
    assert got == pytest.approx(total, rel=1e-4)


def test_a_models_fingerprint_knows_its_weights_and_not_their_dtype():
    first = tiny_model()
    same = tiny_model().to(torch.bfloat16)
    assert model_fingerprint(first) == model_fingerprint(tiny_model()) == model_fingerprint(same)
    with torch.no_grad():
        same.model.layers[1].self_attn.v_proj.weight.mul_(2)
    other = {model_fingerprint(same), model_fingerprint(tiny_model(rope_theta=5e5))}
    assert len(other | {model_fingerprint(first)}) == 3


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in bf16, with weights so small that fp16 rounds them or takes them for 0."""
    where = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[::3] *= 1e-4
                projection.weight[::5] *= 1e-8
    model.to(torch.bfloat16).save_pretrained(where)
    return where


def in_dtype(checkpoint, dtype):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    return LoadedModel("tiny", model, by_letter, ModelGeometry.from_config(model.config))


def test_a_checkpoint_has_one_fingerprint_in_every_dtype(checkpoint):
    assert len({model_fingerprint(in_dtype(checkpoint, dtype).model) for dtype in DTYPES}) == 1


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_a_weight_of_another_sign_or_adapters_are_another_model(part):
    def changed(change):
        model = tiny_model()
        with torch.no_grad():
            change(getattr(model.model.layers[1].self_attn, part))
        return model_fingerprint(model)

    def adapted(projection):
        projection.adapter = torch.nn.Linear(8, 8, bias=False)

    plain = changed(lambda projection: None)
    others = {
        changed(lambda projection: projection.weight[:, ::7].neg_()),
        changed(lambda projection: projection.weight.mul_(4)),
        changed(adapted),
    }
    assert len(others | {plain}) == 4


def test_on_a_cpu_a_calibration_is_made_in_fp32(checkpoint):
    """bf16 weights are exact in fp32, so both give the same numbers to the last bit."""
    made = {}
    for dtype in DTYPES:
        loaded = in_dtype(checkpoint, dtype)
        before = {name: x.clone() for name, x in loaded.model.state_dict().items()}
        made[dtype] = calibrate(loaded, [text("alice")[:576]])
        after = loaded.model.state_dict()
        assert all(torch.equal(x, after[n]) and x.dtype == dtype for n, x in before.items())
    assert made[torch.bfloat16].id == made[torch.float32].id
    for name in COVARIANCES + METRICS:
        first, last = (getattr(made[dtype], name) for dtype in (torch.float32, torch.float16))
        assert torch.allclose(first, last, rtol=1e-2, atol=1e-3 * float(first.abs().max()))


def test_a_calibration_that_fails_leaves_the_weights_as_they_were(checkpoint):
    loaded = in_dtype(checkpoint, torch.bfloat16)
    ids = torch.arange(70)[None]
    want = loaded.model(ids).logits
    loaded.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(loaded, [text("alice")[:576]])
    loaded.model.model.layers[1].mlp.down_proj._forward_pre_hooks.clear()
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model(ids).logits, want)


# ---- refusals ----------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path))  # nobody calibrated it before
    with pytest.raises(InvalidRequestError, match="no tokenizer.*SharedBasis.load"):
        calibrate(tiny(), ["text"])
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        LLM.from_model(tiny_model(), kv_format=SHARED, kv_cache_bytes=8 << 20)


@pytest.mark.parametrize("enough", [True, False])
def test_the_models_attention_is_its_own_again_afterwards(enough):
    loaded = tiny(by_letter)
    ids = torch.arange(70)[None]
    before, logits = loaded.model.config._attn_implementation, loaded.model(ids).logits
    if enough:
        calibrate(loaded, ["x" * 600])
    else:
        with pytest.raises(InvalidRequestError, match="has 100 tokens"):
            calibrate(loaded, ["x" * 60, "y" * 40])
    assert loaded.model.config._attn_implementation == before
    assert torch.equal(loaded.model(ids).logits, logits)


# ---- where an LLM finds it ---------------------------------------------------------------


def test_a_format_that_needs_none_looks_for_none():
    plain = replace(SHARED, basis="page")
    for given in ("auto", "online", "no/such/file"):
        assert find_calibration(given, plain, tiny()) is None


def test_a_calibration_is_taken_as_given_or_from_its_file(tmp_path):
    loaded = tiny()
    own = toy_basis(2, 2, 16, model=model_fingerprint(loaded.model))
    own.save(tmp_path / "own.safetensors")
    assert find_calibration(own, SHARED, loaded) is own
    assert find_calibration(str(tmp_path / "own.safetensors"), SHARED, loaded).id == own.id
    assert find_calibration("online", SHARED, loaded) == "online"
    toy_basis(2, 2, 16, model="other").save(tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="fingerprint other"):
        find_calibration(tmp_path / "other.safetensors", SHARED, loaded)
    with pytest.raises(FormatError, match="fingerprint other"):
        find_calibration(toy_basis(2, 2, 16, model="other"), SHARED, loaded)
    with pytest.raises(InvalidRequestError, match="no calibration file 'gone'.*calibrate"):
        find_calibration("gone", SHARED, loaded)


@pytest.fixture
def quick(monkeypatch):
    """Calibration spans of every built-in calibration made, each of which takes one only."""
    made = []

    def one_span(loaded, texts, *, max_spans, progress):
        made.append(max_spans)
        return calibrate(loaded, texts, max_spans=1)

    monkeypatch.setattr(calibration, "calibrate", one_span)
    return made


def test_the_builtin_calibration_is_made_once_and_again_when_damaged(tmp_path, monkeypatch, quick):
    loaded, made = tiny(by_letter), quick
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path))
    first = find_calibration("auto", SHARED, loaded)
    assert find_calibration("auto", SHARED, loaded).id == first.id and len(made) == 1
    [path] = (tmp_path / "calibrations").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert find_calibration("auto", SHARED, loaded).id == first.id and len(made) == 2
    assert SharedBasis.load(path).id == first.id


def test_the_builtin_calibration_serves_every_dtype(tmp_path, monkeypatch, quick, checkpoint):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path))
    found = [find_calibration("auto", SHARED, in_dtype(checkpoint, dtype)) for dtype in DTYPES]
    assert len({basis.id for basis in found}) == 1 and len(quick) == 1
    assert len(list((tmp_path / "calibrations").iterdir())) == 1
    monkeypatch.setattr(calibration, "builtin_text", lambda: "another text " * 100)
    find_calibration("auto", SHARED, in_dtype(checkpoint, torch.bfloat16))
    assert len(quick) == 2


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(
    tmp_path, monkeypatch, quick, caplog
):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "file"))
    first = find_calibration("auto", SHARED, tiny(by_letter))
    assert find_calibration("auto", SHARED, tiny(by_letter)).id == first.id and len(quick) == 2
    assert "cannot be kept" in caplog.text and "SPECTRAL_PAGED_CACHE" in caplog.text


def test_a_full_disk_leaves_no_part_of_a_calibration(tmp_path, monkeypatch, quick, caplog):
    def full(tensors, path, metadata):
        path.write_bytes(b"some")
        raise OSError("no space left on device")

    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path))
    monkeypatch.setattr("spectral_paged.pages.shared_basis.save_file", full)
    find_calibration("auto", SHARED, tiny(by_letter))
    assert "no space left" in caplog.text
    assert not list((tmp_path / "calibrations").iterdir())


def test_several_may_calibrate_at_once(tmp_path, monkeypatch, quick):
    """Another process saves between this one's writing and its renaming."""
    loaded, save = tiny(by_letter), SharedBasis.save
    pids = iter(range(1, 9))
    monkeypatch.setattr("os.getpid", lambda: next(pids))
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path))
    nested = []

    def save_while_another_does(self, path):
        if not nested:
            nested.append(path)
            find_calibration("auto", SHARED, loaded)
        save(self, path)

    monkeypatch.setattr(SharedBasis, "save", save_while_another_does)
    first = find_calibration("auto", SHARED, loaded)
    [path] = (tmp_path / "calibrations").iterdir()
    assert SharedBasis.load(path).id == first.id and len(quick) == 2


def test_a_model_with_few_positions_is_calibrated_on_short_spans():
    model = tiny_model(max_position_embeddings=700)
    loaded = LoadedModel("short", model, by_letter, ModelGeometry.from_config(model.config))
    assert calibrate(loaded, ["x" * 2000], max_spans=2).num_tokens == 1024
    with pytest.raises(InvalidRequestError, match="has 500 positions; .* needs 576: use kv_format"):
        list(text_spans(range(2000), 1, max_length=500))


# ---- the embedded model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(smollm2(), [text("alice")[:6000]], max_spans=1)


@pytest.mark.model
def test_calibrating_again_gives_the_same_calibration(calibrated):
    again = calibrate(smollm2(), [text("alice")[:6000]], max_spans=1)
    assert again.id == calibrated.id
    assert calibrated.num_tokens == 1024
    assert calibrated.model_fingerprint == model_fingerprint(smollm2().model)
    for name in COVARIANCES + METRICS:
        x = getattr(calibrated, name)
        assert x.shape == (30, 3, 64, 64) and bool(torch.isfinite(x).all())
        assert torch.allclose(x, x.mT, rtol=1e-3, atol=1e-5 * float(x.abs().max()))


@pytest.mark.model
@pytest.mark.parametrize("rank", [16, 32])
def test_a_calibrated_basis_beats_a_random_one_on_another_text(calibrated, rank):
    """Calibrated on one book, measured on another, every layer and KV head."""
    format = PageFormat(
        "s", 3, 64, ((rank, 8),), ((rank, 8),), basis="shared", dim_weighting="none"
    )
    bound = calibrated.bind(format)
    k, v = (getattr(smollm2_kv(), side)[:, :, 64:576] for side in "kv")
    vectors = torch.linalg.qr(torch.randn(30, 3, 64, rank)).Q.mT.contiguous()
    plain = torch.eye(64).expand(30, 3, 64, 64)
    rows = SideRows(vectors, vectors, plain, plain)
    random = BoundBasis(bound.format, rows, rows)
    lost = {}
    for name, basis in (("calibrated", bound), ("random", random)):
        given = {"basis": basis, "layers": range(30)}
        out = decode_pages(encode_pages(k, v, format, **given), format, **given)
        lost[name] = [(x - y).square().sum((-1, -2)) for x, y in zip(out, (k, v))]
    for side in range(2):
        ratio = lost["calibrated"][side] / lost["random"][side]
        assert float(ratio.max()) < 1.0 and float(ratio.mean()) < (0.6, 0.8)[side]
