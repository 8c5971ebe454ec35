"""Calibrations: files that are read and refused, and the basis that a format is bound to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_paged.errors import CorruptFileError, FormatError
from spectral_paged.pages import BasisAccumulator, PageFormat, SharedBasis
from spectral_paged.pages.shared_basis import COVARIANCES, METRICS, metric_root
from support.page_parts import toy_basis, toy_metric

LAYERS, H, D = 2, 3, 32
NAMES = COVARIANCES + METRICS
BASIS = toy_basis(LAYERS, H, D)
FORMAT = PageFormat("t", H, D, ((16, 4),), ((16, 4), (16, 2)), basis="shared")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "sub" / "spectral_basis.safetensors"
    BASIS.save(path)
    return path


# ---- file --------------------------------------------------------------------------------


def test_a_saved_calibration_is_loaded_whole(saved):
    got = SharedBasis.load(saved, model_fingerprint="toy")
    assert got.id == BASIS.id == SharedBasis.load(saved).id
    assert (got.model_fingerprint, got.num_tokens) == ("toy", 1024)
    for name in NAMES:
        assert torch.equal(getattr(got, name), getattr(BASIS, name))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name], "no temporary file stays"


def test_the_id_names_every_statistic_and_the_model():
    ids = {BASIS.id, replace(BASIS, model_fingerprint="other").id}
    for name in NAMES:
        changed = getattr(BASIS, name).clone()
        changed[1, 2, 3] += 1e-3
        ids.add(replace(BASIS, **{name: changed}).id)
    assert len(ids) == 2 + len(NAMES)
    assert all(len(i) == 16 and int(i, 16) >= 0 for i in ids)
    assert replace(BASIS, num_tokens=5).id == BASIS.id


def test_the_calibration_of_another_model_is_refused(saved):
    with pytest.raises(FormatError, match="fingerprint toy; this one has mine.*calibrate"):
        SharedBasis.load(saved, model_fingerprint="mine")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(saved, keep):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CorruptFileError, match="spectral-paged calibrate"):
        SharedBasis.load(saved)


@pytest.mark.parametrize("at", [-1, -5000, -20001])
def test_one_altered_bit_is_refused(saved, at):
    data = bytearray(saved.read_bytes())
    data[at] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CorruptFileError, match="spectral-paged calibrate"):
        SharedBasis.load(saved)


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF" + bytes(500), bytes(1000)])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="no calibration or is damaged"):
        SharedBasis.load(path)


def metadata(**changes):
    known = {"version": "2", "id": BASIS.id, "model_fingerprint": "toy", "num_tokens": "1024"}
    return {k: v for k, v in (known | changes).items() if v is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"version": None},
        {"version": "1"},
        {"num_tokens": "many"},
        {"model_fingerprint": None},
        {"id": "0" * 16},
        {"id": None},
    ],
)
def test_foreign_metadata_is_refused(saved, changes):
    tensors = load_file(saved)
    save_file(tensors, saved, metadata=metadata())
    assert SharedBasis.load(saved).id == BASIS.id
    save_file(tensors, saved, metadata=metadata(**changes))
    with pytest.raises(CorruptFileError):
        SharedBasis.load(saved)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["missing", "shape", "dtype", "nan"])
def test_wrong_tensors_are_refused(saved, name, how):
    tensors = load_file(saved)
    x = tensors[name]
    if how == "missing":
        del tensors[name]
    else:
        changed = {"shape": x[..., :-1], "dtype": x.double(), "nan": x * float("nan")}[how]
        tensors[name] = changed.contiguous()
    save_file(tensors, saved, metadata=metadata())
    with pytest.raises(CorruptFileError):
        SharedBasis.load(saved)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CorruptFileError, match="gone.safetensors"):
        SharedBasis.load(tmp_path / "gone.safetensors")


# ---- binding -----------------------------------------------------------------------------


def metric_of(side, rope, weighting):
    """The metric that a binding weighs by, before its floor."""
    metric = BASIS.o if side == "v" else BASIS.q_post if rope == "post" else BASIS.q_pre
    if weighting == "diagonal":
        return torch.diag_embed(metric.diagonal(dim1=-2, dim2=-1))
    return metric


@pytest.mark.parametrize("weighting", ["none", "diagonal", "calibrated"])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("rope", ["pre", "frame", "post"])
def test_bound_vectors_are_orthonormal_and_span_the_strongest_components(weighting, rotated, rope):
    format = replace(FORMAT, dim_weighting=weighting, band_rotation=rotated, rope=rope)
    bound = BASIS.bind(format)
    covariance = {"k": getattr(BASIS, f"k_{rope}"), "v": BASIS.v}
    for side, rank in (("k", 16), ("v", 32)):
        rows = bound.side(side)
        assert rows.vectors.shape == rows.rows.shape == (LAYERS, H, rank, D)
        eye = torch.eye(rank).expand(LAYERS, H, rank, rank)
        assert torch.allclose(rows.vectors @ rows.vectors.mT, eye, atol=1e-5)
        if weighting == "none":
            assert torch.equal(rows.weight, torch.eye(D).expand_as(rows.weight))
        else:
            want = metric_root(metric_of(side, rope, weighting).double())[0]
            assert torch.allclose(rows.weight, want.float(), atol=1e-5)
        assert torch.equal(rows.rows, rows.rows.half().float())
        assert torch.allclose(rows.rows, rows.vectors @ rows.inverse, rtol=1e-3, atol=1e-5)
        scaled = rows.weight @ covariance[side] @ rows.weight
        kept = torch.einsum("lhrd,lhde,lhre->lhr", rows.vectors, scaled, rows.vectors)
        best = torch.linalg.eigvalsh(scaled)[..., -rank:].sum(-1)
        assert torch.allclose(kept.sum(-1), best, rtol=1e-4)
        if not rotated:
            assert bool((kept[..., 1:] <= kept[..., :-1] * 1.001).all()), "strongest first"


@pytest.mark.parametrize("weighting", ["none", "diagonal", "calibrated"])
def test_rows_at_full_rank_lose_nothing(weighting):
    """Encoding without weights multiplies by none, so nothing may be left of them in the rows."""
    bands = ((32, 8),)
    bound = BASIS.bind(replace(FORMAT, k_bands=bands, v_bands=bands, dim_weighting=weighting))
    x = torch.randn(LAYERS, H, 100, D)
    for rows in (bound.k, bound.v):
        y = x if weighting == "none" else x @ rows.weight
        back = (y @ rows.vectors.mT) @ rows.rows
        assert float((back - x).norm() / x.norm()) < 2**-11  # what fp16 rounds off the rows


def test_a_metric_root_is_symmetric_floored_and_invertible():
    metric = toy_metric(2, 3, 16)
    metric[0, 0] = 0.0
    metric[0, 1, :, 8:] = metric[0, 1, 8:] = 0.0  # nothing is seen of half the dimensions
    weight, inverse = metric_root(metric.double())
    eye = torch.eye(16).double().expand(2, 3, 16, 16)
    assert torch.allclose(weight, weight.mT) and torch.allclose(weight @ inverse, eye)
    assert float(torch.linalg.eigvalsh(weight).min()) >= 0.05**0.5 - 1e-6
    energy = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-30)
    assert torch.allclose(weight @ weight, metric / energy + 0.05 * eye, atol=1e-6)
    louder, _ = metric_root(metric.double() * 1e6)
    assert torch.allclose(louder, weight), "a metric's size means nothing"


def test_of_layers_gives_each_block_the_rows_of_its_layer():
    rows = BASIS.bind(FORMAT).v
    got = rows.of_layers(torch.tensor([1, 0, 1]))
    for part in ("vectors", "rows", "weight", "inverse"):
        x = getattr(rows, part)
        assert torch.equal(getattr(got, part), torch.cat((x[1], x[0], x[1])))


def test_a_bound_format_is_named_after_its_calibration():
    bound = BASIS.bind(FORMAT).format
    assert bound.basis_id == BASIS.id and bound == replace(FORMAT, basis_id=BASIS.id)
    other = toy_basis(LAYERS, H, D, seed=7).bind(FORMAT).format
    assert len({FORMAT.fingerprint, bound.fingerprint, other.fingerprint}) == 3
    assert bound.page_bytes == FORMAT.page_bytes
    assert BASIS.bind(bound).format == bound, "binding again changes nothing"


def test_a_format_bound_to_another_calibration_is_refused():
    other = toy_basis(LAYERS, H, D, seed=7)
    with pytest.raises(FormatError, match=f"bound to calibration {other.id}.*{BASIS.id}"):
        BASIS.bind(other.bind(FORMAT).format)


@pytest.mark.parametrize("changes", [{"num_kv_heads": 2}, {"head_dim": 64}])
def test_other_heads_are_refused(changes):
    with pytest.raises(FormatError, match="calibration is of 3 KV heads of width 32"):
        BASIS.bind(replace(FORMAT, **changes))


def test_binding_is_the_same_every_time():
    format = replace(FORMAT, dim_weighting="calibrated", band_rotation=True)
    first, second = BASIS.bind(format), BASIS.bind(format)
    for side in "kv":
        assert torch.equal(first.side(side).rows, second.side(side).rows)


# ---- statistics --------------------------------------------------------------------------


def test_no_loud_block_decides_the_basis():
    """Two blocks along two directions weigh the same, a million times apart in energy."""
    accumulator = BasisAccumulator(1, 1, 16)
    for direction, loud in ((0, 1000.0), (1, 1.0)):
        x = torch.randn(1, 1, 512, 1) * torch.eye(16)[direction] * loud + 5.0
        accumulator.add([0], k_pre=x, k_post=x, v=x)
    plain = torch.eye(16).expand(1, 1, 16, 16)
    basis = accumulator.finish(q_pre=plain, q_post=plain, o=plain, model_fingerprint="x")
    spread = basis.v[0, 0].diagonal()
    assert torch.allclose(spread[0], spread[1], rtol=1e-4) and float(spread[2:].max()) < 1e-5
    assert basis.num_tokens == 1024


def test_a_block_of_nothing_adds_nothing():
    accumulator = BasisAccumulator(1, 1, 16)
    zero = torch.full((1, 1, 512, 16), 3.0)
    accumulator.add([0], k_pre=None, k_post=zero, v=zero)
    plain = torch.eye(16).expand(1, 1, 16, 16)
    basis = accumulator.finish(q_pre=plain, q_post=plain, o=plain, model_fingerprint="x")
    assert not basis.k_pre.any() and not basis.k_post.any() and not basis.v.any()
