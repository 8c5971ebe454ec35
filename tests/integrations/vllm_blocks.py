"""vLLM's own planner and block manager, run on spectral pages to check docs/vllm.md.

`make vllm` runs it, and fetches the release (a wheel of 340 MB; no GPU is needed) into build/vllm.
A layer has two groups, as that page describes: exact blocks of 64 tokens and pages of 512, in one
pool. vLLM's imports for servers and parsers are left out; the classes used here are unchanged.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import itertools
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

from spectral_paged import PageFormat
from spectral_paged.cache import Visibility

LEFT_OUT = (
    "xgrammar",
    "llguidance",
    "outlines_core",
    "lark",
    "opentelemetry",
    "vllm.parser",
    "vllm.reasoning",
    "vllm.entrypoints",
)


class LeaveOut(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if any(name == n or name.startswith(f"{n}.") for n in LEFT_OUT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, LeaveOut())

import vllm  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_planning import (  # noqa: E402
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.core.kv_cache_utils import (  # noqa: E402
    BlockHashListWithBlockSize,
    generate_scheduler_kv_cache_config,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.single_type_kv_cache_manager import (  # noqa: E402
    SingleTypeKVCacheManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import (  # noqa: E402
    AttentionSpec,
    compute_layer_kv_cache_shape_bytes,
)
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec  # noqa: E402

LAYERS, KV_HEADS, WIDTH, MODEL_LEN = 32, 8, 128, 131_072
FORMAT = replace(
    PageFormat.preset("spectral-quality", num_kv_heads=KV_HEADS, head_dim=WIDTH),
    num_landmark_tokens=0,
    prefill_segment=512,
)
VISIBILITY = Visibility.of(FORMAT)
EXPECTED = {2048: [9, 3], 8192: [9, 15], 32_768: [9, 63], 131_000: [7, 255]}


class PagesManager(SingleTypeKVCacheManager):
    """A block for each page that the next query sees."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sealed = defaultdict(int)  # pages that a step before has written, by request

    def _missing(self, request_id, num_tokens):
        held = self.req_to_blocks[request_id]
        return max(0, VISIBILITY.visible_blocks(num_tokens, 0) - len(held))

    def get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, *args, **kw):
        missing = max(0, self._missing(request_id, num_tokens) - len(new_computed_blocks))
        return missing + self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model):
        new = self.block_pool.get_new_blocks(self._missing(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(new)
        return new

    def cache_blocks(self, request, num_tokens, *args, **kwargs):
        """Publish what is written: vLLM asks while it schedules, and a page comes a step later."""
        sealed = self.sealed[request.request_id]
        super().cache_blocks(request, 512 * sealed, *args, **kwargs)
        self.sealed[request.request_id] = len(self.req_to_blocks[request.request_id])

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs
    ):
        """A query at n sees all blocks before n but the last as pages."""
        hashes = BlockHashListWithBlockSize(block_hashes, block_pool.hash_block_size, 512)
        found = []
        for block_hash in itertools.islice(hashes, max_length // 512):
            cached = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if not cached:
                break
            found.append(cached[0])
        length = 512 * min(max_length // 512, len(found) + 1)
        return ([*found[: VISIBILITY.visible_blocks(length, 0)]],), length


class ExactManager(SingleTypeKVCacheManager):
    """Tokens that are seen as pages need no exact block."""

    def get_num_skipped_tokens(self, num_computed_tokens):
        return 512 * VISIBILITY.visible_blocks(num_computed_tokens, 0)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs
    ):
        """The longest length whose exact tokens are all cached still."""
        for length in range(max_length // 512 * 512, 0, -512):
            first = 512 * VISIBILITY.visible_blocks(length, 0) // 64
            found = [
                block_pool.get_cached_block(block_hashes[i], kv_cache_group_ids)
                for i in range(first, length // 64)
            ]
            if all(found):
                return ([block_pool.null_block] * first + [blocks[0] for blocks in found],), length
        return ([],), 0


@register_kv_cache_spec(manager_class=PagesManager)
@dataclass(frozen=True, kw_only=True)
class PagesSpec(AttentionSpec):
    pass


@register_kv_cache_spec(manager_class=ExactManager)
@dataclass(frozen=True, kw_only=True)
class ExactSpec(AttentionSpec):
    pass


def specs():
    heads = {"num_kv_heads": KV_HEADS, "head_size": WIDTH}
    exact = ExactSpec(block_size=64, dtype=torch.bfloat16, **heads)
    pages = PagesSpec(
        block_size=512,
        dtype=torch.uint8,
        tokens_per_state=512,
        state_content_bytes=FORMAT.layout.head_bytes,
        **heads,
    )
    assert pages.page_size_bytes == FORMAT.page_bytes
    assert exact.page_size_bytes == FORMAT.exact_page_bytes(2)
    shape = compute_layer_kv_cache_shape_bytes(pages, 10)
    assert shape == (10, KV_HEADS, 1, FORMAT.layout.head_bytes)
    layers = range(LAYERS)
    return {f"{i}": exact for i in layers} | {f"{i}.pages": pages for i in layers}


def config(layout):
    """The fields of a `VllmConfig` that planning reads."""
    some = SimpleNamespace
    return some(
        scheduler_config=some(disable_hybrid_kv_cache_manager=False),
        attention_config=some(hisparse_config=None),
        cache_config=some(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
            prefix_match_unit=None,
            enable_prefix_caching=True,
            block_size=512,
        ),
        parallel_config=some(decode_context_parallel_size=1),
        model_config=some(max_model_len=MODEL_LEN),
        speculative_config=None,
        kv_transfer_config=None,
    )


def plan(layout):
    wanted = config(layout)
    groups = get_kv_cache_groups(wanted, specs())
    assert [len(g.layer_names) for g in groups] == [LAYERS, LAYERS]
    planned = get_kv_cache_config_from_groups(wanted, groups, 96 << 30)
    assert planned.kv_cache_tensors[0].size == planned.num_blocks * LAYERS * FORMAT.page_bytes
    return planned, resolve_kv_cache_block_sizes(planned, wanted)


def new_request(name, num_tokens, num_common=0):
    """A prompt and one token more; the first `num_common` tokens are those of every other one."""
    hashes, chain = [], b"common"
    for end in range(64, num_tokens + 1, 64):
        chain = hashlib.sha256(chain + (name.encode() if end > num_common else b"")).digest()
        hashes.append(chain)
    return SimpleNamespace(
        request_id=name,
        num_tokens=num_tokens + 1,
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
        num_in_flight_tokens=0,
        num_preemptions=0,
        status=None,
        skip_reading_prefix_cache=False,
        num_output_placeholders=0,
        block_hashes=hashes,
        shared_prefix_boundary=None,
        lora_request=None,
    )


def serve(manager, request):
    """Blocks by group while the token after the prompt is computed, and the tokens found cached."""
    found, hit = manager.get_computed_blocks(request)[:2]
    cached = {"num_new_computed_tokens": hit, "new_computed_blocks": found} if hit else {}
    request.num_computed_tokens = 0
    while request.num_computed_tokens < request.num_prompt_tokens:
        done = request.num_computed_tokens or hit
        chunk = min(512, request.num_prompt_tokens - done)
        assert manager.allocate_slots(request, chunk, **cached) is not None
        request.num_computed_tokens, cached = done + chunk, {}
    assert manager.allocate_slots(request, 1) is not None
    groups = manager.coordinator.get_blocks(request.request_id)
    held = [[block.block_id for block in blocks if not block.is_null] for blocks in groups]
    return held, hit


def main():
    register_all_kvcache_specs(None)
    print(f"vLLM {vllm.__version__}: blocks of {FORMAT.page_bytes:,} bytes in {LAYERS} layers")
    for layout in (KVCacheLayout.BLHNC, KVCacheLayout.LBHNC):
        planned, sizes = plan(layout)
        print(f"{layout.name}: {planned.num_blocks} blocks, scheduler and hash block {sizes}")
        scheduled = generate_scheduler_kv_cache_config([planned])
        manager = KVCacheManager(scheduled, MODEL_LEN, *sizes, enable_caching=False)
        free = manager.block_pool.get_num_free_blocks()
        for num_tokens, expected in EXPECTED.items():
            request = new_request(f"{num_tokens}", num_tokens)
            held = [len(blocks) for blocks in serve(manager, request)[0]]
            exact, pages = held
            plain = num_tokens * FORMAT.exact_page_bytes(2) / 64
            print(
                f"{num_tokens:8,} tokens: {pages} pages, {exact} exact blocks, "
                f"{plain / (sum(held) * FORMAT.page_bytes):.2f}x"
            )
            assert held == expected
            manager.free(request)
            assert manager.block_pool.get_num_free_blocks() == free
        prefix_hits(KVCacheManager(scheduled, MODEL_LEN, *sizes))


def prefix_hits(manager):
    """A prompt with 4,196 tokens in common finds 4,096: seven pages, eight exact blocks."""
    pages = {}
    for name, expected in (("first", 0), ("beside it", 4096), ("another", 4096)):
        request = new_request(name, 8192, num_common=4196)
        (exact, pages[name]), hit = serve(manager, request)
        print(f"{name}: {hit} tokens found cached")
        assert (len(exact), len(pages[name]), hit) == (9, 15, expected)
        shared = [a == b for a, b in zip(pages["first"], pages[name], strict=True)]
        assert shared == [True] * 15 if name == "first" else shared == [True] * 7 + [False] * 8
        if name != "first":
            manager.free(request)


if __name__ == "__main__":
    main()
