"""Rows of a batch over a cache: copies, steps that fail, and lack of room.

Both `generate` integrations run them, and `RowBatch` itself any order of operations.
"""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged import SpectralKVCache
from spectral_paged.cache import read_history
from spectral_paged.cache.sealer import SealCheck, Sealer
from spectral_paged.errors import CapacityError, InvalidRequestError, NonFiniteError
from spectral_paged.integrations.row_batch import Remedies, RowBatches
from support.padded_batch import batch, generated
from support.row_generators import INTEGRATIONS
from support.tiny_model import raise_once, tiny_model

REMEDIES = Remedies(
    tokens="(tokens)", copies="(copies)", sequences="(sequences)", failed="(failed)"
)


@pytest.fixture(params=INTEGRATIONS)
def integration(request):
    return INTEGRATIONS[request.param]


def more(inputs, width=1, token=11):
    """The next `width` columns of every row, and the mask of all columns."""
    mask = inputs["attention_mask"]
    ids = torch.full((len(mask), width), token)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, torch.ones_like(ids)], dim=1)}


def still_serves(rows):
    rows.restart()
    gc.collect()  # an error's frames hold the batch that failed
    rows.settle()
    rows.kv_cache.check_integrity()
    assert rows.kv_cache.stats()["num_sequences"] == 0
    inputs = batch((5, 70), seed=5)
    return torch.equal(rows.generate(inputs), generated(tiny_model(), inputs))


def test_beams_are_those_of_a_dynamic_cache(integration):
    inputs, options = batch((5, 700)), {"num_beams": 3, "max_new_tokens": 10}
    rows = integration()
    expected = generated(tiny_model(), inputs, **options)
    assert torch.equal(rows.generate(inputs, **options), expected)
    rows.kv_cache.check_integrity()


@pytest.mark.parametrize("sources", [[0, 0, 0], [2, 0, 2], [1, 2, 0], [2, 2, 1]])
def test_a_reordered_row_goes_on_as_its_source(integration, sources):
    rows, inputs = integration(), batch((5, 130, 64))
    rows.forward(inputs)
    rows.reorder(sources)
    lengths = [(5, 130, 64)[source] for source in sources]
    assert rows.num_tokens() == lengths
    mask = {"attention_mask": inputs["attention_mask"][sources]}
    got = rows.forward(more(mask))[:, -1]
    alone = integration()
    alone.forward(inputs)
    assert torch.allclose(got, alone.forward(more(inputs))[:, -1][sources], atol=1e-5)
    rows.kv_cache.check_integrity()


def test_a_forward_that_fails_leaves_rows_where_they_stood(integration, monkeypatch):
    rows, inputs = integration(), batch((5, 130))
    rows.forward(inputs)
    mlp = type(rows.model.model.layers[1].mlp)
    with monkeypatch.context() as context:
        raise_once(context, mlp, "forward", RuntimeError("out of memory"), call=2)
        with pytest.raises(RuntimeError, match="out of memory"):
            rows.forward(more(inputs))
    assert rows.num_tokens() == [5, 130]
    got = rows.forward(more(inputs))
    undisturbed = integration()
    undisturbed.forward(inputs)
    assert torch.equal(got, undisturbed.forward(more(inputs)))
    assert still_serves(rows)


def test_a_first_forward_that_fails_leaves_no_rows(integration, monkeypatch):
    rows, inputs = integration(), batch((5, 130))
    mlp = type(rows.model.model.layers[1].mlp)
    with monkeypatch.context() as context:
        raise_once(context, mlp, "forward", KeyError("gone"), call=2)
        with pytest.raises(KeyError, match="gone") as held:
            rows.forward(inputs)
    assert rows.kv_cache.stats()["num_sequences"] == 0 and held
    assert rows.forward(inputs).shape[0] == 2
    assert still_serves(rows)


def test_a_step_that_fails_at_its_end_gives_the_rows_up(integration, monkeypatch):
    """Its tokens are stored, but the caller did not hear of it."""
    rows, inputs = integration(), batch((5, 130))
    rows.forward(inputs)
    with monkeypatch.context() as context:
        raise_once(context, Sealer, "seal_due", MemoryError(), call=1)
        with pytest.raises(MemoryError) as held:
            rows.forward(more(inputs))
    assert rows.kv_cache.stats()["num_sequences"] == 0 and held
    with pytest.raises(InvalidRequestError, match="failed half way"):
        rows.forward(more(inputs))
    with pytest.raises(InvalidRequestError, match="failed half way"):
        rows.reorder([1, 0])
    assert still_serves(rows)


@pytest.mark.parametrize("is_known", [True, False], ids=["at once", "as on CUDA"])
def test_nan_gives_the_rows_up_and_is_told_once(integration, is_known, monkeypatch):
    monkeypatch.setattr(SealCheck, "is_known", property(lambda self: is_known))
    rows, inputs = integration("spectral-int8"), batch((700, 5))
    weight = rows.model.model.layers[1].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    rows.restart()
    with pytest.raises(NonFiniteError, match="layer 1"):
        rows.forward(inputs)
        rows.forward(more(inputs))
    with torch.no_grad():
        weight.copy_(kept)
    assert rows.kv_cache.stats()["num_sequences"] == 0
    rows.settle()
    rows.restart()
    assert rows.generate(inputs).shape == (2, 8)


def test_copies_that_do_not_fit_leave_nothing_behind(integration):
    rows, inputs = integration(kv_cache_bytes=300_000), batch([250, 250, 250])
    rows.forward({name: x[:1] for name, x in inputs.items()})
    assert rows.num_tokens() == [250]
    with pytest.raises(CapacityError, match="unshared tokens of 14 rows.*kv_cache_bytes"):
        rows.reorder([0] * 14)
    assert rows.kv_cache.stats()["num_sequences"] == 0
    assert still_serves(rows)


def test_tokens_that_do_not_fit_leave_what_is_stored(integration):
    rows, inputs = integration(kv_cache_bytes=300_000), batch((250, 250))
    rows.forward(inputs)
    with pytest.raises(CapacityError, match="more tokens in 2 rows do not fit.*kv_cache_bytes"):
        while True:
            rows.forward(more(inputs))
            inputs["attention_mask"] = more(inputs)["attention_mask"]
    width = inputs["attention_mask"].shape[1]
    assert width > 250 and rows.num_tokens() == [width, width]
    assert still_serves(rows)


def test_pages_are_sealed_and_read_in_full_precision_under_autocast(integration, monkeypatch):
    rows, inputs = integration("spectral-int8"), batch((700, 5))
    expected = [rows.forward(inputs)[:, -1], rows.forward(more(inputs))[:, -1]]
    rows.restart()
    seen = []
    for name in ("attend", "begin_step", "end_step"):
        run = getattr(SpectralKVCache, name)
        monkeypatch.setattr(
            SpectralKVCache,
            name,
            lambda *args, run=run: seen.append(torch.is_autocast_enabled("cpu")) or run(*args),
        )
    with torch.autocast("cpu", torch.bfloat16):
        got = [rows.forward(inputs)[:, -1], rows.forward(more(inputs))[:, -1]]
    assert len(seen) == 2 * (2 + 2) and not any(seen)
    for found, wanted in zip(got, expected):
        assert (found - wanted).norm() < 0.05 * wanted.norm()


# ---- RowBatch itself ---------------------------------------------------------------------


def exact_cache(**options):
    return SpectralKVCache(
        num_layers=1,
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=16,
        rope=None,
        format="exact",
        kv_cache_bytes=1 << 20,
        max_model_len=2048,
        enable_prefix_caching=False,
        debug_poison=True,
        **options,
    )


def numbered(count):
    return torch.full((count, 1, 16), 0.0) + torch.arange(count)[:, None, None]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.lists(st.integers(0, 70), min_size=4, max_size=4)),
        st.tuples(st.just("abort"), st.lists(st.integers(0, 70), min_size=4, max_size=4)),
        st.tuples(st.just("take"), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=30)
@given(operations)
def test_any_order_of_steps_and_copies_keeps_each_rows_tokens(done):
    """Against lists: what a row would read is what its sources stored, in order."""
    batches = RowBatches(exact_cache(max_num_seqs=4), REMEDIES)
    rows, cache = batches.new(4), batches.cache
    stored, number = [[] for _ in range(4)], 0

    def store(rows, counts, *, fails):
        nonlocal number
        new = {row: count for row, count in enumerate(counts) if count}
        if not new:
            return
        values = number + numbered(sum(new.values()))
        number += len(values)
        try:
            with rows.step(new):
                cache.append(0, values, values)
                found = [k[0, :, 0].tolist() for k, _ in read_history(cache, 0)]
                parts = iter(values[:, 0, 0].split(list(new.values())))
                grown = {row: stored[row] + next(parts).tolist() for row in new}
                assert found == list(grown.values())
                if fails:
                    raise RuntimeError
        except RuntimeError:
            return
        for row, tokens in grown.items():
            stored[row] = tokens

    for name, numbers in [*done, ("step", [1] * 4)]:
        if name == "take":
            rows.take(numbers)
            stored = [list(stored[source]) for source in numbers]
        else:
            store(rows, numbers, fails=name == "abort")
        assert rows.num_tokens() == list(map(len, stored)) and len(set(rows.seq_ids)) == 4
        cache.check_integrity()
    del rows
    batches.collect()
    assert cache.stats()["num_sequences"] == 0
    cache.check_integrity()


def test_more_rows_than_sequences_are_refused_and_given_up():
    batches = RowBatches(exact_cache(max_num_seqs=3), REMEDIES)
    held, rows = batches.new(1), batches.new(3)
    held.open([5])
    with pytest.raises(CapacityError, match=r"3 rows.*holds 3 sequences.*\(sequences\)"):
        rows.open([5, 5, 5])
    rows.give_up()
    assert batches.cache.stats()["num_sequences"] == 1
    with pytest.raises(InvalidRequestError, match=r"half way: \(failed\)"):
        rows.take([0, 1, 2])


def test_rows_that_were_given_up_are_not_freed_again_when_their_batch_goes():
    """Others may have their names by then, in a cache that names them anew."""
    batches = RowBatches(exact_cache(), REMEDIES)
    rows = batches.new(2)
    rows.open([5, 5])
    rows.give_up()
    del rows
    assert batches.released == []
    rows = batches.new(2)
    del rows
    assert len(batches.released) == 2
    batches.collect()
    assert batches.released == []
