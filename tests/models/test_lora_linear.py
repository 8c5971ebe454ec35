"""The products of a layer with adapters: each token with its own, in either form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from spectral_paged.models.lora import LayerAdapter, LoRALinear, TokenAdapters

CPU = torch.device("cpu")
WIDTHS = 24, 40


def layer_of(max_loras, rank, *, grouped, ranks, dtype=torch.float32, seed=0):
    """A layer and what was written to it: A, B and scale by index."""
    torch.manual_seed(seed)
    tokens = TokenAdapters(max_loras, rank, CPU, grouped=grouped)
    base = nn.Linear(*WIDTHS, dtype=dtype)
    layer = LoRALinear(base, tokens, max_loras, rank, device=CPU, dtype=dtype)
    written = {}
    for index, own in enumerate(ranks, start=1):
        a, b = torch.randn(own, WIDTHS[0], dtype=dtype), torch.randn(WIDTHS[1], own, dtype=dtype)
        write(layer, index, a, b, index / 2)
        written[index] = a, b, index / 2
    return layer, written


def write(layer, index, a, b, scale):
    layer.write(index, LayerAdapter(a, b, scale).factors(layer.a.dtype))


def expected(layer, written, inputs, indices):
    rows = layer.base(inputs)
    for row, index in enumerate(indices):
        if index in written:
            a, b, scale = written[index]
            rows[row] += scale * (b @ (a @ inputs[row]))
    return rows


@settings(max_examples=40, deadline=None)
@given(
    st.booleans(),
    st.integers(1, 4).flatmap(
        lambda most: st.tuples(
            st.just(most),
            st.lists(st.integers(1, 8), min_size=most, max_size=most),
            st.lists(st.integers(0, most), min_size=1, max_size=70),
        )
    ),
)
@torch.inference_mode()
def test_each_token_has_its_own(grouped, drawn):
    most, ranks, indices = drawn
    layer, written = layer_of(most, 8, grouped=grouped, ranks=ranks)
    inputs = torch.randn(len(indices), WIDTHS[0])
    with layer.tokens.of(torch.tensor(indices, dtype=torch.int32)):
        got = layer(inputs[None])[0]
    torch.testing.assert_close(got, expected(layer, written, inputs, indices))
    plain = [row for row, index in enumerate(indices) if not index]
    assert torch.equal(got[plain], layer.base(inputs)[plain])
    assert torch.equal(layer(inputs), layer.base(inputs)), "nothing is active after the step"


@pytest.mark.parametrize("grouped", [False, True])
@torch.inference_mode()
def test_an_adapter_that_is_written_over_leaves_nothing(grouped):
    layer, written = layer_of(2, 8, grouped=grouped, ranks=[8, 8])
    a, b = torch.randn(2, WIDTHS[0]), torch.randn(WIDTHS[1], 2)
    stacks = layer.a.data_ptr(), layer.b.data_ptr()
    write(layer, 1, a, b, 1.0)
    layer.write(2, None)
    inputs = torch.randn(5, WIDTHS[0])
    with layer.tokens.of(torch.tensor([1, 2, 0, 2, 1])):
        got = layer(inputs)
    torch.testing.assert_close(got, expected(layer, {1: (a, b, 1.0)}, inputs, [1, 2, 0, 2, 1]))
    assert (layer.a.data_ptr(), layer.b.data_ptr()) == stacks, "graphs read these addresses"


@pytest.mark.parametrize("grouped", [False, True])
@torch.inference_mode()
def test_what_overflows_with_one_adapter_stays_with_it(grouped):
    layer, written = layer_of(2, 8, grouped=grouped, ranks=[4, 4], dtype=torch.float16)
    layer.a[1] *= 3e4
    inputs = torch.randn(4, WIDTHS[0], dtype=torch.float16) * 100
    with layer.tokens.of(torch.tensor([1, 2, 0, 1])):
        got = layer(inputs)
    assert not torch.isfinite(got[[0, 3]]).all()
    assert torch.isfinite(got[[1, 2]]).all()
    assert torch.equal(got[2], layer.base(inputs)[2])


@pytest.mark.parametrize("grouped", [False, True])
@torch.inference_mode()
def test_compiled_layers_outlive_loads_and_steps_of_any_length(grouped):
    """Two pieces of code, with adapters and without, serve all steps."""
    dtype = torch.bfloat16 if grouped else torch.float32  # what torch traces of grouped products
    layer, _ = layer_of(3, 8, grouped=grouped, ranks=[8, 8, 8], dtype=dtype)
    counter = CompileCounter()
    torch._dynamo.reset()
    layer.compile(backend=counter, dynamic=True, fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    for number, length in enumerate((7, 3, 20, 64, 5, 33)):
        a, b = torch.randn(4, WIDTHS[0]), torch.randn(WIDTHS[1], 4)
        write(layer, 1 + number % 3, a, b, 0.5)
        indices = torch.randint(4, (length,), generator=generator)
        inputs = torch.randn(1, length, WIDTHS[0], dtype=dtype)
        assert torch.equal(layer(inputs), layer.base(inputs))
        with layer.tokens.of(indices):
            torch.testing.assert_close(layer(inputs), layer.forward(inputs))
    assert counter.frame_count == 2
