"""Blocks sealed in place by the codec: the pages and counts of the seal kernel's twin."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spectral_paged.cache import encoder as encoder_module
from spectral_paged.cache.encoder import BlockKind, KernelEncoder, TorchEncoder, encoder_of
from spectral_paged.kernels.math.rotary import Rotation, stored_keys
from spectral_paged.kernels.ops import TorchOps
from spectral_paged.pages import encode_pages
from support.kernel_cases import SealCase

NAMES = ("quality-64", "no-mean-no-gain", "no-slots")


def encoder_for(case, dtype=torch.float32):
    kind = BlockKind([0, 1], case.format.layout, dtype, Rotation(case.rope.cos, case.rope.sin))
    return TorchEncoder(kind, SimpleNamespace(format=case.format, bound=case.basis))


def sealed(case, dtype=torch.float32, blocks=slice(None)):
    return case.seal(lambda *places, **_: encoder_for(case, dtype).seal(*places), blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 2, 8])
@pytest.mark.parametrize("name", NAMES)
def test_pages_are_the_codecs_at_any_batch(monkeypatch, name, at_once, dtype):
    monkeypatch.setattr(encoder_module, "BLOCKS_AT_ONCE", at_once)
    case = SealCase(name, blocks=3, dtype=dtype)
    exact = case.arena[:, : int(case.pages.min()) * 128].clone()
    assert not sealed(case, dtype).any()
    assert torch.equal(case.arena[:, : int(case.pages.min()) * 128], exact)
    for block in range(3):
        span = slice(int(case.first[block]), int(case.first[block]) + 512)
        cos, sin = case.rope.cos[span], case.rope.sin[span]
        k = stored_keys(case.k[block], cos, sin, case.format.rope)
        rows = {"basis": case.basis, "layers": [0, 1]}
        want = encode_pages(k, case.v[block].float(), case.format, **rows)
        assert torch.equal(case.page(block), want)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_inf_are_counted_where_they_lie_and_spoil_no_other_page(side):
    def spoil(k, v):
        x = (k, v)[side]
        x[1, 0, 1, 511, 63] = float("nan")
        x[1, 1, 0, 0, :5] = float("inf")

    clean, case = SealCase("quality-64"), SealCase("quality-64", change=spoil)
    sealed(clean)
    bad = sealed(case)
    assert bad.shape == (2, 2, 2, 2) and bad.dtype == torch.int32
    assert {tuple(x): int(bad[tuple(x)]) for x in bad.nonzero().tolist()} == {
        (1, 0, 1, side): 1,
        (1, 1, 0, side): 5,
    }
    assert torch.equal(case.page(0), clean.page(0))


def test_a_kernel_seals_the_layouts_it_takes_and_the_codec_all_others():
    case, ops = SealCase("quality-64"), TorchOps()
    rotation = Rotation(case.rope.cos, case.rope.sin)
    kind = BlockKind([0, 1], case.format.layout, torch.float32, rotation)
    for kernel, backend in ((None, "torch"), (lambda *places, **options: None, "triton")):
        ops.seal_kernel = lambda layout, found=kernel: found
        found = encoder_of(kind, None, ops)
        assert isinstance(found, TorchEncoder if kernel is None else KernelEncoder)
        assert found.backend == backend
