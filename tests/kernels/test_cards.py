"""GPUs are refused by name, or told apart by what they can do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spectral_paged import LLM, SpectralKVCache
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import InvalidRequestError
from spectral_paged.kernels.launch.card import check_card
from support.cards import CARDS, stand_on

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Gives this machine a GPU of a name and capability, driven by CUDA or ROCm."""

    def give(name, capability, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch, "version", SimpleNamespace(hip=hip))

    return give


REFUSED = [
    (("AMD Instinct MI300X", (9, 4), "6.4"), r"AMD Instinct MI300X is driven by ROCm 6\.4.*'cpu'"),
    (("Tesla V100", (7, 0)), r"Tesla V100 has compute capability 7\.0; .* 7\.5 or newer.*'cpu'"),
]


@pytest.mark.parametrize("given, words", REFUSED)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_without_kernels_is_refused_before_a_model_is_looked_for(gpu, given, words, device):
    gpu(*given)
    with pytest.raises(InvalidRequestError, match=words):
        choose_device(device)
    with pytest.raises(InvalidRequestError, match=words):
        LLM("a model that nobody looks for", device=device)


@pytest.mark.parametrize("given, words", REFUSED)
def test_a_cache_on_a_gpu_without_kernels_is_refused(gpu, given, words):
    gpu(*given)
    with pytest.raises(InvalidRequestError, match=words):
        SpectralKVCache(
            num_layers=1,
            num_q_heads=1,
            num_kv_heads=1,
            head_dim=64,
            rope=None,
            format="exact",
            device="cuda",
            kv_cache_bytes=1 << 20,
        )


@pytest.mark.parametrize("kind", CARDS)
def test_gpus_with_kernels_pass(gpu, kind):
    gpu(CARDS[kind].name, CARDS[kind].capability)
    check_card(CUDA)


@pytest.mark.parametrize("kind", CARDS)
def test_auto_is_the_dtype_that_the_hardware_computes_in(gpu, monkeypatch, kind):
    gpu(CARDS[kind].name, CARDS[kind].capability)
    stand_on(CARDS[kind], monkeypatch.setattr)
    half = torch.float16 if kind == "sm_75" else torch.bfloat16
    assert choose_dtype("auto", CUDA) == half
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    for dtype in ("float16", torch.float32):
        assert choose_dtype(dtype, CUDA).is_floating_point
    if kind == "sm_75":
        with pytest.raises(InvalidRequestError, match=r"T4 \(sm_75\) does not compute.*'float16'"):
            choose_dtype("bfloat16", CUDA)
    else:
        assert choose_dtype("bfloat16", CUDA) == torch.bfloat16
