"""The seal kernel against the torch encoder, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import PageFormat
from spectral_paged.cache.sealer import SealCheck
from spectral_paged.errors import NonFiniteError
from spectral_paged.kernels.seal.triton.seal import seal, supports
from spectral_paged.pages import decode_pages
from support.kernel_cases import PAGES, SEALED, SealCase
from support.small_cache import feed, small_cache

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter; test_gpu runs these on the GPU"
)


@pytest.mark.parametrize("name, many", [(n, 2 if n == "quality-64" else 1) for n in SEALED])
def test_a_sealed_page_is_as_good_as_the_twins(name, many):
    """With several layers and KV heads once: where a page lies depends on no format."""
    case = SealCase(name, layers=many, heads=many, blocks=1)
    assert not case.seal(seal).any()
    for got, want in zip(*case.errors(0)):
        assert got < 1.02 * want


def test_a_page_depends_neither_on_those_beside_it_nor_on_what_lay_there_before():
    case = SealCase("quality-64", layers=1, heads=1)
    pages = case.arena[:, int(case.pages.min()) * 128 :]
    pages.zero_()
    case.seal(seal)
    together = [case.page(b) for b in range(2)]
    pages.fill_(255)
    case.seal(seal, slice(1, 2))
    assert torch.equal(case.page(1), together[1])
    assert bool((case.page(0) == 255).all())
    case.seal(seal, slice(0, 1))
    assert torch.equal(case.page(0), together[0])


def test_outlier_tokens_are_the_loud_ones_in_ascending_order():
    def loud(k, v):
        for token in (500, 3, 130, 77):
            k[..., token, :] = 40 * torch.randn(k[..., token, :].shape).to(k)

    case = SealCase("quality-64", layers=1, blocks=1, change=loud)
    case.seal(seal)
    assert bool((case.outliers(0) == torch.tensor([3, 77, 130, 500])).all())


@pytest.mark.parametrize("size", [10, 1_000, 10_000])
@pytest.mark.parametrize("name, num_loud", [("quality-64", 4), ("quality-64", 9)])
def test_loud_tokens_cost_the_others_what_they_cost_in_the_twins_page(name, num_loud, size):
    loud = torch.randperm(512)[:num_loud]

    def shout(k, v):
        for x in (k, v):
            x[..., loud, :] = size * torch.randn(x[..., loud, :].shape).to(x)

    case = SealCase(name, heads=1, blocks=1, change=shout)
    assert not case.seal(seal).any()
    rest = torch.ones(512, dtype=torch.bool).index_fill(0, loud, False)
    for got, want in zip(*case.errors(0, rest)):
        assert got < 1.03 * want
    if num_loud <= 4:
        plain = SealCase(name, heads=1, blocks=1)
        plain.seal(seal)
        for got, want in zip(case.errors(0, rest)[0], plain.errors(0, rest)[0]):
            assert got < 1.05 * want


def test_nan_and_inf_are_counted_where_they_lie():
    """K's in block 1, V's in block 0: of both, the first and the last element of a head."""
    where = {(1, 0, 1): (0, 511, 63), (1, 1, 0): (0, 0, 0), (0, 0, 1): (1, 511, 63)}
    where[0, 1, 0] = (1, 0, 0)

    def spoil(k, v):
        for i, (place, (side, token, element)) in enumerate(where.items()):
            (k, v)[side][(*place, token, element)] = float("inf" if i % 2 else "nan")

    case = SealCase("quality-64", change=spoil)
    bad = case.seal(seal)
    assert bad.shape == (2, 2, 2, 2)
    found = {tuple(x) for x in bad.nonzero().tolist()}
    assert {(*place, side) for place, (side, *_) in where.items()} <= found
    assert not bad[0, ..., 0].any() and not bad[1, ..., 1].any()


@pytest.mark.parametrize("power", [-60, 40])
def test_blocks_of_any_finite_size_keep_their_precision(power):
    def scale(k, v):
        k *= 2.0**power
        v *= 2.0**power

    case = SealCase("no-slots", layers=1, heads=1, blocks=1, change=scale)
    assert not case.seal(seal).any()
    for got, want in zip(*case.errors(0)):
        assert got < 1.02 * want


def test_a_block_of_zeros_comes_back_as_zeros():
    def clear(k, v):
        k.zero_()
        v.zero_()

    case = SealCase("quality-64", layers=1, heads=1, blocks=1, change=clear)
    assert not case.seal(seal).any()
    rebuilt = decode_pages(case.page(0), case.format, basis=case.basis, layers=[0])
    assert not any(x.any() for x in rebuilt)


def test_formats_without_this_kernel_are_left_to_the_encoder():
    for name in ("int8-128", "many-bands", "uniform-96", "no-mean-no-gain"):
        dim, fields = PAGES[name]
        assert not supports(PageFormat(name, 1, dim, **fields).layout)


# ---- in a cache --------------------------------------------------------------------------


def test_a_cache_that_seals_by_kernel_says_what_one_with_the_twin_says(monkeypatch):
    found = []
    for op in (None, seal):
        cache = small_cache(monkeypatch, op)
        assert cache.stats()["seal_backend"] == ("torch" if op is None else "triton")
        for s, prompt in {"a": 700, "b": 100}.items():  # sealed behind a prompt, and as it grows
            cache.add_sequence(s, num_prompt_tokens=prompt)
        outs, failed = feed(cache, "ab", 720)
        assert not failed and cache.stats()["pages_sealed"] > 0
        found.append(outs)
    for s in "ab":
        error = (found[0][s] - found[1][s]).norm() / found[0][s].norm()
        assert float(error) < 0.05


def test_a_first_seal_of_nan_alone_decides_no_basis_and_fails_by_name(monkeypatch):
    for op in (None, seal):
        cache = small_cache(monkeypatch, op, calibration="online", dim_weighting="none")
        cache.add_sequence("b", num_prompt_tokens=700)
        _, failed = feed(cache, "b", 700, spoiled="b")
        assert isinstance(failed["b"], NonFiniteError)


def test_a_sequence_with_nan_fails_at_its_seal_and_the_others_go_on(monkeypatch):
    messages = []
    for op in (None, seal):
        cache = small_cache(monkeypatch, op)
        for s in "ab":
            cache.add_sequence(s, num_prompt_tokens=700)
        _, failed = feed(cache, "ab", 700, spoiled="b")
        assert set(failed) == {"b"} and isinstance(failed["b"], NonFiniteError)
        messages.append(str(failed["b"]))
        cache.check_integrity()
    assert messages[0] == messages[1]


@pytest.mark.parametrize("is_freed", [False, True])
def test_a_fork_made_before_its_parents_nan_is_known_is_told_of_it(monkeypatch, is_freed):
    """As on CUDA, where a check is known later; it has the page, whether or not its parent goes."""
    monkeypatch.setattr(SealCheck, "is_known", property(lambda self: False))
    cache = small_cache(monkeypatch, seal)
    cache.add_sequence("a", num_prompt_tokens=700)
    feed(cache, "a", 700, spoiled="a")
    assert cache.fork("a", "b") and cache.fork("b", "c")
    if is_freed:
        cache.free("a")
        cache.free("b")
    failed = cache.settle().failed
    assert failed.keys() == ({"c"} if is_freed else {"a", "b", "c"})
    assert str(failed["c"]).startswith("K of sequence 'c' has NaN or Inf in layer 0")
    assert not cache.settle().failed
    for s in failed:
        cache.free(s)
    cache.check_integrity()


def test_a_warm_up_compiles_what_a_seal_will_launch_and_writes_nothing(monkeypatch):
    asked = []

    def recorded(*args, compile_only=False, **options):
        asked.append((compile_only, [(x.shape[1:], x.dtype) for x in args], options))
        return seal(*args, compile_only=compile_only, **options)

    cache = small_cache(monkeypatch, recorded)
    [group] = cache.groups
    before = group.arena.planes.clone()
    cache.sealer.warm_up(group)
    assert torch.equal(group.arena.planes, before)
    cache.add_sequence("a", num_prompt_tokens=1100)
    feed(cache, "a", 1100)
    (first, *what), (second, *later) = asked[:2]
    assert first and not second and what[0] == later[0]
    assert what[1].keys() == later[1].keys()
    assert all(torch.equal(x, later[1][n]) for n, x in what[1].items() if torch.is_tensor(x))


def test_an_undecided_calibration_has_nothing_to_compile(monkeypatch):
    asked = []
    cache = small_cache(monkeypatch, lambda *args, **options: asked.append(options))
    for waiting in (True, False):
        monkeypatch.setattr(type(cache.sealer.basis), "is_waiting", waiting)
        cache.sealer.warm_up(cache.groups[0])
        assert len(asked) == (not waiting)
