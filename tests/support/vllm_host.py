"""vLLM's host code, unchanged, on a machine without a card: its configs and its scheduler.

vLLM's compiled extensions are left out of its imports, and its platform says that it is an H200.
A `Host` has a scheduler of vLLM's over a real cache; its loop stands for vLLM's engine core and
model runner, with steps in flight as theirs.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections import deque
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

COMPILED = (
    "vllm._C",
    "vllm._C_stable_libtorch",
    "vllm._moe_C",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "xgrammar",
    "llguidance",
    "outlines_core",
)


class _LeaveOut(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if any(name == left or name.startswith(f"{left}.") for left in COMPILED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


class _NoOps:
    """`torch.ops._C` of a build without kernels: no kernel is there, nothing is supported."""

    def __getattr__(self, name):
        if "supports" not in name:
            raise AttributeError(name)
        return lambda *args: False


def import_vllm():
    """Import vLLM's host code, with a platform that claims to be an H200."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    sys.meta_path.insert(0, _LeaveOut())
    torch.ops._C = _NoOps()
    from triton.backends import backends

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    backends.pop("amd", None)
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Platform(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id=0):
            return "NVIDIA H200"

        @classmethod
        def get_device_total_memory(cls, device_id=0):
            return 139 << 30

        @classmethod
        def device_count(cls):
            return 1

        @classmethod
        def num_compute_units(cls, device_id=0):
            return 132

    vllm.platforms._current_platform = Platform()


import_vllm()

from vllm import SamplingParams  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402, F401
from vllm.v1.core.kv_cache_utils import (  # noqa: E402
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs  # noqa: E402
from vllm.v1.outputs import ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

from spectral_paged import SpectralKVCache  # noqa: E402
from spectral_paged.integrations.vllm import engine_args, flash_attention  # noqa: E402, F401
from spectral_paged.integrations.vllm.backend import SpectralAttention  # noqa: E402
from spectral_paged.integrations.vllm.graphs import SpectralCudaGraphs  # noqa: E402, F401
from spectral_paged.integrations.vllm.model_state import SpectralModelState  # noqa: E402
from spectral_paged.integrations.vllm.passes import CapturedPass  # noqa: E402
from spectral_paged.integrations.vllm.rows import RowSpec, row_tokens  # noqa: E402
from spectral_paged.integrations.vllm.runtime import PagedRuntime  # noqa: E402
from spectral_paged.rope import RotaryTable  # noqa: E402

LAYERS, HEADS, KV_HEADS, WIDTH, LONGEST = 2, 4, 2, 64, 8192
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_size": HEADS * WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH,
    "vocab_size": 1000,
    "max_position_embeddings": LONGEST,
}


def model_folder(folder, **changes):
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The config of a tiny Llama."""
    return model_folder(tmp_path_factory.mktemp("llama"))


def tokens(count, seed=0):
    return [(31 * seed + 7 * i * i + i) % 890 + 10 for i in range(count)]


def engine_config(folder, *, max_num_seqs=8, kv_format="spectral-int8", **others):
    """vLLM's config of a tiny Llama with pages; `others` are arguments of vLLM's."""
    given = {"dtype": "bfloat16", "max_model_len": LONGEST, "max_num_batched_tokens": 1024}
    args = engine_args(max_num_seqs=max_num_seqs, kv_format=kv_format, **(given | others))
    made = EngineArgs(
        model=folder, tokenizer=folder, skip_tokenizer_init=True, load_format="dummy", **args
    )
    return made.create_engine_config()


class Host:
    """vLLM's scheduler over a cache of `megabytes` on the CPU, and a loop that runs its steps.

    Args:
        format: page format of the cache.
        graphs: run decode steps as CUDA graphs would, padded, over static inputs.
        kv_host_memory: bytes of host memory for prompts that the pages lose.
        check_dense: compare every output with dense attention over all tokens (`exact` only).
    """

    def __init__(
        self,
        folder,
        *,
        megabytes=24,
        format="spectral-int8",
        graphs=False,
        check_dense=False,
        kv_host_memory=None,
        **config,
    ):
        self.config = engine_config(
            folder, kv_format=format, kv_host_memory=kv_host_memory, **config
        )
        register_all_kvcache_specs(self.config)
        spec = RowSpec(
            block_size=row_tokens(LONGEST),
            num_kv_heads=KV_HEADS,
            head_size=WIDTH,
            dtype=torch.uint8,
        )
        self.names = [f"layer.{i}" for i in range(LAYERS)]
        specs = dict.fromkeys(self.names, spec)
        planned = generate_scheduler_kv_cache_config(
            get_kv_cache_configs(self.config, [specs], [64 << 20])
        )
        self.config.cache_config.num_gpu_blocks = planned.num_blocks
        self.config.cache_config.block_size = spec.block_size
        self.config.validate_block_size()
        block, self.hash_block = resolve_kv_cache_block_sizes(planned, self.config)
        self.cache = SpectralKVCache(
            num_layers=LAYERS,
            num_q_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=WIDTH,
            rope=RotaryTable.from_theta(10000.0, WIDTH, max_positions=LONGEST),
            format=format,
            kv_cache_bytes=megabytes << 20,
            max_num_seqs=self.config.scheduler_config.max_num_seqs + 1,
            max_model_len=LONGEST,
            enable_prefix_caching=self.config.cache_config.enable_prefix_caching,
            calibration="online" if format == "spectral-int8" else None,
            kv_host_memory=kv_host_memory,
            debug_poison=True,
        )
        self.runtime = PagedRuntime.current = PagedRuntime(self.cache)
        init_none_hash(hashlib.sha256)
        self.scheduler = self.config.scheduler_config.get_scheduler_cls()(
            vllm_config=self.config,
            kv_cache_config=planned,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=block,
            hash_block_size=self.hash_block,
            log_stats=True,
        )
        self.state = object.__new__(SpectralModelState)
        self.attention = SpectralAttention(HEADS, WIDTH, WIDTH**-0.5, KV_HEADS)
        self.groups = [[SimpleNamespace(layer_names=self.names)]]
        self.graphs, self.check_dense = graphs, check_dense
        self.computed, self.history = {}, {}
        self.in_flight = deque()
        self.num_steps = self.num_preempted = self.max_chunk = 0
        self.worst = 0.0
        self.bad_token = None  # a token whose K and V are NaN
        self.errors = {}

    def request(self, name, prompt, max_tokens, *, salt=None, lora=None, priority=0, **params):
        return Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, temperature=0.0, **params
            ),
            pooling_params=None,
            cache_salt=salt,
            lora_request=LoRARequest(lora, 1, "/none") if lora else None,
            priority=priority,
            block_hasher=get_request_block_hasher(self.hash_block, hashlib.sha256),
        )

    def add(self, *requests):
        for request in requests:
            self.scheduler.add_request(request)

    def abort(self, name):
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    def step(self, *, depth=2, sample_late=False):
        """Schedule and run a step, and take the oldest one's tokens if `depth` are in flight.

        Args:
            sample_late: sample after the next step is scheduled, as structured outputs do.
        """
        output = self.scheduler.schedule()
        self.num_preempted += len(output.preempted_req_ids or ())
        order = self._execute(output)
        if order and not sample_late:
            self.runtime.close_step()
        # a chunk of a prompt that goes on samples nothing
        samples = {name: not self.scheduler.requests[name].is_prefill_chunk for name in order}
        self.in_flight.append((output, order, samples))
        if len(self.in_flight) >= depth or not order:
            self._update()
        self.cache.check_integrity()

    def finish(self, **how):
        """Run steps until no request is left, and take all tokens."""
        for _ in range(5000):
            if not self.scheduler.has_requests():
                break
            self.step(**how)
        else:
            raise AssertionError("the scheduler makes no progress")
        while self.in_flight:
            self._update()
        self.runtime.close_step()
        self.cache.check_integrity()
        assert self.cache.stats()["num_sequences"] == 0
        assert not self.scheduler.running and not self.scheduler.waiting

    def _update(self):
        output, order, samples = self.in_flight.popleft()
        tokens = [[self._token(name)] if samples[name] else [] for name in order]
        places = {name: place for place, name in enumerate(order)}
        told = self.scheduler.update_from_output(
            output, ModelRunnerOutput(order, places, sampled_token_ids=tokens)
        )
        for outputs in told.values():
            for one in outputs.outputs:
                if str(one.finish_reason) == "error":
                    self.errors[one.request_id] = one

    def _token(self, name):
        return 10 + hash((name, self.num_steps)) % 900

    def _execute(self, output):
        for name in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.computed.pop(name, None)
            self.history.pop(name, None)
        for new in output.scheduled_new_reqs:
            self.computed[new.req_id] = new.num_computed_tokens
            if not new.num_computed_tokens:  # else a session, which goes on
                self.history.pop(new.req_id, None)
        cached = output.scheduled_cached_reqs
        self.computed |= dict(zip(cached.req_ids, cached.num_computed_tokens))
        order = sorted(output.num_scheduled_tokens, key=output.num_scheduled_tokens.get)
        if not order:
            return []
        counts = np.array([output.num_scheduled_tokens[name] for name in order], dtype=np.int32)
        total = int(counts.sum())
        full = self.graphs and bool((counts == 1).all())
        padded = total + 1 if full else total + 3
        batch = SimpleNamespace(
            req_ids=order,
            num_scheduled_tokens=counts,
            num_computed_tokens_np=np.array([self.computed[n] for n in order], dtype=np.int32),
            num_tokens_after_padding=padded,
        )
        mode = CUDAGraphMode.FULL if full else CUDAGraphMode.PIECEWISE
        metadata = self.state.prepare_attn(batch, mode, (), None, self.groups, None)
        if full:  # what the graph of this room has captured
            captured = CapturedPass(self.runtime, padded, self.runtime.num_blocks)
            metadata = dict.fromkeys(self.names, captured)
        for layer, name in enumerate(self.names):
            self._attend(layer, metadata[name], order, counts, padded)
        self.num_steps += 1
        self.max_chunk = max(self.max_chunk, int(counts.max()))
        return order

    def _attend(self, layer, step, order, counts, padded):
        generator = torch.Generator().manual_seed(1000 * self.num_steps + layer)
        q = torch.randn(padded, HEADS, WIDTH, generator=generator)
        k, v = torch.randn(2, padded, KV_HEADS, WIDTH, generator=generator)
        at = 0
        for name, count in zip(order, counts):
            if name == self.bad_token:
                v[at : at + count] = torch.nan
            at += count
        out = torch.full_like(q, torch.nan)
        module = SimpleNamespace(spectral_layer=layer)
        self.attention.forward(module, q, k, v, torch.empty(0), step, output=out)
        if self.check_dense:
            self._compare(layer, order, counts, q, k, v, out)

    def _compare(self, layer, order, counts, q, k, v, out):
        at = 0
        for name, count in zip(order, counts):
            new = slice(at, at + count)
            held = self.history.setdefault(name, {}).setdefault(layer, [k[:0], v[:0]])
            held[0], held[1] = torch.cat((held[0], k[new])), torch.cat((held[1], v[new]))
            keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for x in held)
            assert keys.shape[1] == self.computed[name] + count
            scores = q[new].transpose(0, 1) @ keys.transpose(1, 2) * WIDTH**-0.5
            length = keys.shape[1]
            later = torch.arange(length) > (torch.arange(count) + length - count)[:, None]
            want = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
            self.worst = max(self.worst, float((out[new] - want.transpose(0, 1)).abs().max()))
            at += count
