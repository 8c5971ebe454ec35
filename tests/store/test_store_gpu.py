"""Host memory below a cache on a CUDA device: pinned, copied beside the model, given back."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import LLM, SamplingParams
from spectral_paged.models.calibration import model_fingerprint
from spectral_paged.store import CudaCopier, HostTier
from spectral_paged.store.memory import HostMemory
from support.page_parts import toy_basis
from support.tiny_model import random_prompts, tiny_format, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = random_prompts([1300, 1700, 1200, 1500])


def of_format(format):
    """The tiny model on the device, its format and basis; the fast kernels take width 64."""
    if format == "spectral-int8":
        return tiny_model().cuda(), {"kv_format": tiny_format(format)}
    if format == "exact":
        return tiny_model().cuda(), {"kv_format": format}
    model = tiny_model(head_dim=64)
    basis = toy_basis(2, 2, 64, model=model_fingerprint(model))
    return model.cuda(), {"kv_format": format, "calibration": basis}


def test_memory_is_pinned_until_it_is_closed():
    memory = HostMemory(8 << 20, 1 << 20, pinned=True)
    piece = memory.pieces([3], 1 << 20)[0]
    assert piece.is_pinned()
    memory.close()
    assert not piece.is_pinned(), "the driver still holds it"


def test_pinned_memory_goes_back_when_nobody_holds_it():
    memory = HostMemory(8 << 20, 1 << 20, pinned=True)
    piece = memory.pieces([3], 1 << 20)[0]
    del memory
    assert not piece.is_pinned()


@pytest.mark.parametrize("sizes", [(128, 5000, 1), (1 << 20,)])
def test_bytes_come_back_though_their_places_are_overwritten_at_once(sizes):
    """The device is busy meanwhile, so every copy is late."""
    device = torch.device("cuda")
    memory = HostMemory.of(64 << 20, largest=8 << 20, usual=1 << 20, device=device, poison=True)
    host = HostTier(memory, CudaCopier(device))
    planes = [torch.randint(256, (4, size + 128), device=device).byte() for size in sizes]
    views = [plane[:, 64:-64] for plane in planes]
    want = [view.clone() for view in views]
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy
    assert host.save(b"a", None, views)
    for view in views:
        view.fill_(255)
    while b"a" not in host:
        pass
    held = host.hold(b"a")
    skipped = [views[0].numel(), *views[1:]]
    host.load(held, skipped).wait()
    assert (views[0] == 255).all() and all(map(torch.equal, views[1:], want[1:]))
    for _ in range(20):
        busy = busy @ busy
    for view in views:
        view.fill_(7)  # queued before the load, which must come behind it
    copy = host.load(held, views)
    copy.hold()
    found = [view.clone() for view in views]
    assert all(map(torch.equal, found, want))
    host.let_go(held)
    host.check_integrity()
    host.close()


@pytest.mark.parametrize("format", ["spectral-int8", "spectral-quality", "exact"])
@pytest.mark.parametrize("eager", [True, False])
def test_tokens_are_the_same_with_and_without_host_memory(format, eager):
    """With graphs and steps queued ahead too; rounds are as many as lose the pool's prefixes."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    outputs = []
    model, given = of_format(format)
    sizes = {"exact": 1_200_000, "spectral-int8": 2 << 20, "spectral-quality": 5 << 20}
    for memory in (None, "64MiB"):
        llm = LLM.from_model(
            model,
            **given,
            kv_cache_bytes=sizes[format],
            max_num_seqs=2,
            prefill_segment=512,
            kv_host_memory=memory,
            enforce_eager=eager,
            compile_layers=False,
            debug_poison=True,
        )
        with llm:
            for tail in ([], [7, 8, 9], [7, 8, 9]):
                found = llm.generate([p + tail for p in PROMPTS], params, use_tqdm=False)
                outputs.append([o.outputs[0].token_ids for o in found])
                llm.cache.check_integrity()
            by_tier = llm.stats()["prefix_hit_tokens_by_tier"]
    assert by_tier["host"] > 2000
    assert outputs[:3] == outputs[3:]


@pytest.mark.parametrize("format", ["spectral-quality", "exact"])
def test_a_restart_is_warm_and_says_the_same(format, tmp_path):
    """Graphs and steps queued ahead; the second LLM finds what the first one left on disk."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    outputs = []
    model, given = of_format(format)
    for folder in (None, tmp_path, tmp_path):
        with LLM.from_model(
            model,
            **given,
            kv_cache_bytes=32 << 20,
            max_num_seqs=4,
            prefill_segment=512,
            kv_store=folder,
            compile_layers=False,
            debug_poison=True,
        ) as llm:
            found = llm.generate(PROMPTS, params, use_tqdm=False)
            by_tier = llm.stats()["prefix_hit_tokens_by_tier"]
        outputs.append([o.outputs[0].token_ids for o in found])
    assert by_tier["disk"] > 3000
    assert outputs[0] == outputs[1] == outputs[2]
