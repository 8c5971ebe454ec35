"""Eigenvectors of many small matrices: the Triton kernel and its torch twin."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import PageFormat, SpectralKVCache
from spectral_paged.kernels.seal import eigenvectors as torch_twin
from spectral_paged.kernels.seal.triton import eigenvectors as eigenvectors_triton
from spectral_paged.kernels.seal.triton.eigenvectors import eigenvectors
from spectral_paged.pages import encode_pages
from spectral_paged.rope import RotaryTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def symmetric(values, dim, seed=0):
    """A matrix with these eigenvalues, and its eigenvectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    values = torch.as_tensor(values, dtype=torch.float64)
    return (rows.T @ (values[:, None] * rows)).float().to(DEVICE), rows.float().to(DEVICE)


def identity_error(rows):
    product = rows @ rows.transpose(-1, -2)
    return float((product - torch.eye(rows.shape[-1], device=rows.device)).abs().max())


@pytest.mark.parametrize("solve", [eigenvectors, torch_twin.eigenvectors])
@pytest.mark.parametrize("dim", [2, 16, 24, 40])
def test_rows_are_the_eigenvectors_strongest_first(solve, dim):
    values = 3.0 * 0.7 ** torch.arange(dim)
    matrix, rows = symmetric(values, dim)
    found = solve(matrix[None])[0]
    assert identity_error(found) < 1e-4
    strong = int((values > 1e-3 * values[0]).sum())
    cosines = (found * rows).sum(-1).abs()[:strong]
    assert cosines.min() > 0.999


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_size_of_a_matrix_does_not_matter(scale):
    matrix, rows = symmetric([9.0, 4.0, 1.0, 0.5, 0.2, 0.1, 0.01, 0.001], 8)
    found = eigenvectors(scale * matrix[None])[0]
    assert (found * rows).sum(-1).abs().min() > 0.999


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_what_a_matrix_does_not_span_is_filled_up_with_orthonormal_rows(rank):
    values = torch.zeros(16)
    values[:rank] = torch.tensor([5.0, 3.0, 2.0])[:rank]
    matrix, rows = symmetric(values, 16)
    found = eigenvectors(matrix[None])[0]
    assert bool(torch.isfinite(found).all()) and identity_error(found) < 1e-4
    if rank:
        assert (found * rows).sum(-1).abs()[:rank].min() > 0.999


def test_equal_eigenvalues_give_an_orthonormal_basis_of_their_space():
    matrix, rows = symmetric([4.0] * 5 + [1.0] * 11, 16)
    found = eigenvectors(matrix[None])[0]
    assert identity_error(found) < 1e-4
    inside = found[:5] @ rows[:5].T
    torch.testing.assert_close(inside.square().sum(-1), torch.ones(5, device=DEVICE))


def test_a_matrix_does_not_depend_on_those_beside_it():
    matrices = torch.stack([symmetric(torch.rand(16), 16, seed)[0] for seed in range(3)])
    together = eigenvectors(matrices)
    for i in range(3):
        assert torch.equal(eigenvectors(matrices[i : i + 1])[0], together[i])


def test_most_energy_of_a_block_is_in_the_leading_rows_as_with_torch():
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(-torch.arange(32) / 4)
    x = (torch.randn(2, 512, 32, generator=generator) * spread).to(DEVICE)
    gram = x.transpose(-1, -2) @ x
    kept = [
        (x @ solve(gram)[:, :8].transpose(-1, -2)).square().sum()
        for solve in (eigenvectors, torch_twin.eigenvectors)
    ]
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [16, 64, 96, 128, 256])
def test_leading_eigenvectors_keep_as_much_energy_as_any_can(dim):
    generator = torch.Generator().manual_seed(dim)
    spread = torch.exp(-torch.arange(dim) / 10)
    mixed = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    x = (torch.randn(40, 512, dim, generator=generator) * spread @ mixed).cuda()
    x[7], x[9, 3:] = 0, 0  # no energy, and three tokens of it
    gram = x.transpose(-1, -2) @ x
    found = eigenvectors(gram)
    eye = torch.eye(dim, device="cuda")
    assert (found @ found.transpose(-1, -2) - eye).abs().max() < 1e-4
    kept = dim // 4  # of which no basis keeps more energy than the strongest eigenvalues
    energy = (x.double() @ found[:, :kept].double().transpose(-1, -2)).square().sum((-1, -2))
    most = torch.linalg.eigvalsh(gram.double())[:, -kept:].sum(-1)
    torch.testing.assert_close(energy, most, rtol=1e-5, atol=1e-6)
    others = torch.cat((gram[20:], gram[:20]))  # as many: the Cholesky factor is the library's
    assert torch.equal(eigenvectors(others)[:20], found[20:])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_after_a_warm_up_nothing_that_decomposes_compiles():
    format = PageFormat.preset("spectral-int8", num_kv_heads=2, head_dim=48)  # of no other test
    cache = SpectralKVCache(
        num_layers=2,
        num_q_heads=2,
        num_kv_heads=2,
        head_dim=48,
        format=format,
        device="cuda",
        rope=RotaryTable.from_theta(10000.0, 48, max_positions=2048),
        kv_cache_bytes=4 << 20,
        max_num_seqs=4,
    )

    def compiled():
        return sum(len(c[0]) for c in eigenvectors_triton._jacobi_kernel.device_caches.values())

    before = compiled()
    cache.sealer.warm_up(cache.groups[0])
    assert compiled() == before + 1
    k, v = torch.randn(2, 3, 2, 512, 48, device="cuda")
    encode_pages(k, v, format)
    assert compiled() == before + 1
