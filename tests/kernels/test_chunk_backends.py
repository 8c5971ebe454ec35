"""Backends for prompt chunks: who takes which, what a library is called with, and their gaps."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.errors import MissingPackageError
from spectral_paged.kernels.chunk import cudnn, fa3, gpu, varlen, xformers
from spectral_paged.kernels.chunk.backend import ChunkKind
from spectral_paged.kernels.chunk.reference import KEY_GAP, ChunkSpans, chunk_attention
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.ops import TorchOps
from support.chunk_kernels import attend_by_tiles, tiles_with_lse
from support.kernel_cases import some_sinks
from support.small_cache import small_cache

CPU = torch.device("cpu")
BF16 = ChunkKind(torch.bfloat16, 128, CPU)


def card(monkeypatch, capability):
    """Let the CPU count as a GPU of this compute capability."""
    for module in (cudnn, fa3, varlen):
        monkeypatch.setattr(module, "capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


@pytest.fixture
def no_build():
    fa3.use_build(None)
    fa3._wheel.cache_clear()
    yield
    fa3.use_build(None)
    fa3._wheel.cache_clear()


def some_build(**fields):
    fields = {"attend_with_lse": tiles_with_lse} | fields
    return fa3.Build("a wheel", attend_by_tiles, (torch.bfloat16,), **fields)


def kind(dtype=torch.bfloat16, dim=128, softcap=None, window=None, has_sinks=False):
    return ChunkKind(dtype, dim, CPU, softcap, window, has_sinks)


# ---- choice ------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_hopper_alone_takes_flash_attention_3(monkeypatch, no_build, capability):
    card(monkeypatch, capability)
    assert gpu.backend(BF16) == "varlen"  # no build is there
    fa3.use_build(some_build())
    assert gpu.backend(BF16) == ("fa3" if capability == (9, 0) else "varlen")


@pytest.mark.parametrize(
    "fields, asked, chosen, why",
    [
        ({}, {"softcap": 30.0, "window": 100}, "fa3", None),
        ({"slides": False}, {"window": 100}, "varlen", "without windows"),
        ({"caps": False}, {"softcap": 30.0}, "math", "without soft caps"),
        ({}, {"dtype": torch.float16}, "varlen", "bfloat16"),
        ({}, {"dtype": torch.float32}, "sdpa", "float32"),
        ({"max_dim": 128}, {"dim": 256}, "varlen", "up to 128"),
        ({}, {"has_sinks": True, "window": 128}, "fa3", None),
        ({"attend_with_lse": None}, {"has_sinks": True}, "varlen", "no log-sum-exp"),
        ({}, {"has_sinks": True, "dtype": torch.float32}, "math", "float32"),
        ({}, {"dim": 264}, "sdpa", "264"),
        ({}, {"dim": 20}, "sdpa", "20"),
    ],
)
def test_what_a_build_leaves_out_goes_to_the_next(
    monkeypatch, no_build, fields, asked, chosen, why
):
    card(monkeypatch, (9, 0))
    fa3.use_build(some_build(**fields))
    assert gpu.backend(kind(**asked)) == chosen
    found = gpu.BACKENDS["fa3"].obstacle(kind(**asked))
    assert found is None if why is None else why in found


def test_a_cpu_takes_torch_and_says_why_not_others(no_build):
    assert gpu.backend(BF16) == "sdpa" and gpu.backend(kind(softcap=3.0)) == "math"
    for name in ("fa3", "xformers", "varlen", "cudnn"):
        assert gpu.BACKENDS[name].obstacle(BF16)


@pytest.mark.parametrize("name", ["xformers", "varlen", "cudnn", "sdpa"])
def test_kernels_without_a_cap_are_refused_with_one_that_has_it(monkeypatch, name):
    card(monkeypatch, (8, 0))
    monkeypatch.setattr(xformers, "_has_operator", lambda: True)
    q, k = torch.zeros(2, 2, 8), torch.zeros(1, 2, 8)
    spans = ChunkSpans.of([2], [2], CPU)
    with pytest.raises(ValueError, match=f"{name} .*: math takes"):
        gpu.chunk_attention(q, k, k, spans=spans, scale=1.0, softcap=2.0, by=name)


def test_cudnn_is_taken_by_name_only(monkeypatch, no_build):
    card(monkeypatch, (9, 0))
    monkeypatch.setattr(varlen, "_parameters", frozenset)
    assert cudnn.obstacle(BF16) is None and gpu.backend(BF16) == "sdpa"


# ---- gaps --------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=6),
    st.sampled_from([0, 1, KEY_GAP]),
)
def test_spans_lie_apart_by_a_gap_and_cover_every_row(sizes, gap):
    queries, keys = [n for n, _ in sizes], [n + past for n, past in sizes]
    spans = ChunkSpans.of(queries, keys, CPU, gap=gap)
    found = list(spans)
    assert [q.stop - q.start for q, _ in found] == queries == spans.q_lengths
    assert [k.stop - k.start for _, k in found] == keys == spans.k_lengths
    assert all(b.start - a.stop == gap for (_, a), (_, b) in pairwise(found))
    assert found[0][1].start == 0 and found[-1][1].stop == spans.num_key_rows
    assert spans.gap_starts == ([k.stop for _, k in found[:-1]] if gap else [])
    assert (spans.max_q, spans.max_k) == (max(queries), max(keys))
    # to a kernel a gap is a sequence that asks nothing
    parts = list(zip(spans.cu_q.diff().tolist(), spans.cu_k.diff().tolist()))
    assert [p for p in parts if p[0]] == list(zip(queries, keys))
    assert [p for p in parts if not p[0]] == [(0, gap)] * (len(sizes) - 1 if gap else 0)


@pytest.mark.parametrize("name", ["xformers", "sdpa"])
def test_kernels_without_a_log_sum_exp_are_refused_with_sinks(monkeypatch, name):
    monkeypatch.setattr(xformers, "_has_operator", lambda: True)
    q, k = torch.zeros(2, 2, 8), torch.zeros(1, 2, 8)
    spans = ChunkSpans.of([2], [2], CPU)
    with pytest.raises(ValueError, match=f"{name} .*: math takes"):
        gpu.chunk_attention(q, k, k, spans=spans, scale=1.0, sinks=some_sinks(2), by=name)


@pytest.mark.parametrize("sinks", [None, some_sinks(6)])
@pytest.mark.parametrize("window, softcap", [(None, None), (50, None), (None, 2.0), (7, 2.0)])
@pytest.mark.parametrize("dim", [16, 96])
def test_flash_attention_3_is_called_causally_from_the_bottom_right(
    monkeypatch, no_build, window, softcap, dim, sinks
):
    card(monkeypatch, (9, 0))
    fa3.use_build(some_build())
    queries, keys = [1, 37, 300, 64], [1, 500, 300, 65]
    spans = ChunkSpans.of(queries, keys, CPU, gap=KEY_GAP)
    q = torch.randn(sum(queries), 6, dim).bfloat16()
    k, v = torch.randn(2, 2, spans.num_key_rows, dim).bfloat16()
    options = {"spans": spans, "scale": 0.2, "window": window, "softcap": softcap, "sinks": sinks}
    got = gpu.chunk_attention(q, k, v, **options)
    want = chunk_attention(q, k, v, **options)
    assert float((got.float() - want).norm() / want.norm()) < 5e-3


@pytest.fixture
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("length", [30, 200])  # without history, and with it
@pytest.mark.parametrize("neighbours", [1, 3])
def test_nan_of_a_neighbour_stays_with_it_though_kernels_read_past_a_chunk(length, neighbours):
    """A kernel that loads whole tiles multiplies the next chunk's values by zero."""
    cache = small_cache()

    class Tiles(type(cache.ops)):
        @staticmethod
        def chunk_kernel(q, k, v, *, spans, scale, softcap=None, window=None, sinks=None):
            left = -1 if window is None else window - 1
            flat = (q, k.transpose(0, 1), v.transpose(0, 1))
            return attend_by_tiles(*flat, spans, Scores(scale, softcap), (left, 0))

    cache.attention.ops = Tiles()
    names = [f"s{i}" for i in range(neighbours + 1)]
    for name in names:
        cache.add_sequence(name, num_prompt_tokens=length)
    for count in (length - 30, 30) if length > 30 else (30,):
        plan = cache.reserve(dict.fromkeys(names, count))
        cache.begin_step(plan)
        total = count * len(names)
        shape = (total, cache.format.num_kv_heads, cache.format.head_dim)
        k, v = torch.randn(2, *shape)
        v[count:] = math.nan  # of all but the first sequence
        out = cache.attend(0, torch.randn(total, cache.num_q_heads, shape[2]), k, v)
        cache.attend(1, torch.randn(total, cache.num_q_heads, shape[2]), k, v)
        assert out[:count].isfinite().all() and out[count:].isnan().all()
        cache.end_step()


# ---- libraries ---------------------------------------------------------------------------

WHEEL = """
calls = []

def flash_attn_varlen_func(*args, **options):
    calls.append((args, options))
    return args[0]
"""
FLAGS = {"FP16": True, "LOCAL": True, "SOFTCAP": False, "HDIM64": False, "HDIM96": False} | {
    "HDIM128": False,
    "HDIM192": True,
    "HDIM256": True,
}


def install(monkeypatch, folder, interface=WHEEL, **flags):
    built = {f"FLASHATTENTION_DISABLE_{name}": off for name, off in (FLAGS | flags).items()}
    (folder / "fa3_fwd_interface.py").write_text(interface)
    (folder / "fa3_fwd_config.py").write_text(f"CONFIG = {{'build_flags': {built}}}\n")
    monkeypatch.syspath_prepend(folder)
    for name in ("fa3_fwd_interface", "fa3_fwd_config"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_wheel_says_what_it_was_built_with(monkeypatch, tmp_path, no_build):
    install(monkeypatch, tmp_path)
    build = fa3.build_in_use()
    assert (build.dtypes, build.max_dim) == ((torch.bfloat16,), 128)
    assert not build.slides and build.caps
    fa3._wheel.cache_clear()


def test_the_wheel_is_called_by_its_own_names(monkeypatch, tmp_path, no_build):
    install(monkeypatch, tmp_path)
    card(monkeypatch, (9, 0))
    spans = ChunkSpans.of([2, 3], [5, 3], CPU, gap=4)
    q, k = torch.zeros(5, 4, 64).bfloat16(), torch.zeros(2, spans.num_key_rows, 64).bfloat16()
    assert gpu.chunk_attention(q, k, k, spans=spans, scale=0.5, softcap=7.0) is q
    import fa3_fwd_interface

    ((args, options),) = fa3_fwd_interface.calls
    assert [x.shape for x in args[1:3]] == [(spans.num_key_rows, 2, 64)] * 2
    assert [x.tolist() for x in args[3:5]] == [[0, 2, 2, 5], [0, 5, 9, 12]] and args[5:] == (3, 5)
    assert options == {
        "softmax_scale": 0.5,
        "causal": True,
        "window_size": (-1, 0),
        "softcap": 7.0,
        "num_splits": 1,
    }


def test_the_wheel_is_asked_for_its_log_sum_exp_where_there_are_sinks(
    monkeypatch, tmp_path, no_build
):
    install(
        monkeypatch, tmp_path, interface=WHEEL.replace("args[0]", "args[0], args[0][:, :, 0].T")
    )
    card(monkeypatch, (9, 0))
    spans = ChunkSpans.of([2, 3], [5, 3], CPU)
    q, k = torch.ones(5, 4, 64).bfloat16(), torch.zeros(2, 8, 64).bfloat16()
    got = gpu.chunk_attention(q, k, k, spans=spans, scale=0.5, sinks=torch.tensor([1.0, 3, 1, -9]))
    assert torch.allclose(got[0, :2, 0].float(), torch.tensor([0.5, 0.1192]), atol=1e-3)
    import fa3_fwd_interface

    ((_, options),) = fa3_fwd_interface.calls
    assert options["return_attn_probs"] is True


def test_a_wheel_that_does_not_load_is_refused_when_a_cache_is_made(
    monkeypatch, tmp_path, no_build
):
    install(monkeypatch, tmp_path, interface="raise OSError('libcudart.so.13 is not there')")
    card(monkeypatch, (9, 0))
    with pytest.raises(ImportError, match="libcudart.so.13 is not there.*uninstall it"):
        gpu.backend(BF16)
    monkeypatch.setattr(TorchOps, "prefill_backend", lambda *_: gpu.backend(BF16))
    with pytest.raises(MissingPackageError, match="fa3-fwd is installed and does not load"):
        small_cache()


@pytest.mark.parametrize("names", [{"window_size", "enable_gqa"}, {"is_causal"}])
def test_torchs_own_is_called_as_this_torch_takes_it(monkeypatch, names):
    calls = []

    def varlen_attn(*args, **options):
        calls.append((args, options))
        return args[0], None

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "_parameters", lambda: names)
    spans = ChunkSpans.of([2, 3], [5, 3], CPU)
    q, k = torch.zeros(5, 4, 64), torch.zeros(8, 2, 64)
    assert varlen.attend(q, k, k, spans, Scores(0.5), 6) is q
    ((args, options),) = calls
    assert args[3:] == (spans.cu_q, spans.cu_k, 3, 5)
    causal = {"is_causal": True} if "is_causal" in names else {}
    slides = {"window_size": (5, 0), "enable_gqa": True} if "window_size" in names else {}
    assert options == {"scale": 0.5} | causal | slides


def test_torchs_own_is_asked_for_its_log_sum_exp_where_there_are_sinks(monkeypatch):
    def varlen_attn(q, *_, return_aux, **options):
        return q, torch.ones(4, 5) * return_aux.lse

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    spans, q, k = ChunkSpans.of([5], [8], CPU), torch.ones(5, 4, 64), torch.zeros(8, 2, 64)
    scores, sinks = Scores(0.5, has_sinks=True), torch.tensor([1.0, 3.0, 1.0, -9.0])
    got = varlen.attend(q, k, k, spans, scores, None, sinks)
    assert torch.allclose(got[3, :2, 0], torch.tensor([0.5, 0.1192]), atol=1e-3)
    card(monkeypatch, (8, 0))
    assert varlen.obstacle(kind(has_sinks=True)) is None
    monkeypatch.setattr(varlen, "_parameters", lambda: {"window_size"})
    assert "no log-sum-exp in this torch" in varlen.obstacle(kind(has_sinks=True))


def test_cudnn_attends_to_history_and_to_own_tokens_apart(monkeypatch):
    """Its causal mask is aligned at the top left."""
    seen = []

    def fused(q, k, v, scale, causal, with_lse):
        seen.append((len(q), len(k), causal, with_lse))
        group = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("thd,lhd->htl", q, keys) * scale
        if causal:
            late = torch.arange(len(k)) > torch.arange(len(q))[:, None]
            scores = scores.masked_fill(late, -math.inf)
        out = torch.einsum("htl,lhd->thd", scores.softmax(-1), values)
        return out, scores.logsumexp(-1).T

    monkeypatch.setattr(cudnn, "_fused", fused)
    queries, keys = [1, 37, 300, 64], [1, 500, 300, 65]
    for gap in (0, 5):
        spans = ChunkSpans.of(queries, keys, CPU, gap=gap)
        q, k, v = torch.randn(402, 6, 16), *torch.randn(2, 2, spans.num_key_rows, 16)
        flat = (x.transpose(0, 1) for x in (k, v))
        got = cudnn.attend(q, *flat, spans, Scores(0.3), None)
        assert torch.allclose(got, chunk_attention(q, k, v, spans=spans, scale=0.3), atol=1e-5)
    sinks = some_sinks(6)
    got = cudnn.attend(q, k.transpose(0, 1), v.transpose(0, 1), spans, Scores(0.3), None, sinks)
    want = chunk_attention(q, k, v, spans=spans, scale=0.3, sinks=sinks)
    assert torch.allclose(got, want, atol=1e-5)
    own = [(1, 1), (37, 37), (300, 300), (64, 64)]
    assert [s[:2] for s in seen[:6] if s[2]] == own
    assert [s for s in seen[:6] if not s[2]] == [(37, 463, False, True), (64, 1, False, True)]
