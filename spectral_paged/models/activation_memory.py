"""The memory that a step needs besides weights and cache, measured by running the largest one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_paged.cache import HISTORY_TOKENS
from spectral_paged.kernels.ops import PageOps, page_ops
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.models.attention_choice import register_attention, use_attention
from spectral_paged.models.decode_graphs import graph_capacity
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.pages import PageFormat
from spectral_paged.sampling import SampledTokens, SampleRow, SamplingParams, SamplingState

# kernel modules and the nodes of graphs, which nothing counts before they are there
MODULE_BYTES = 512 << 20
# the sampler's largest temporaries, the counts that penalties keep, and biases
COSTLY = SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=1.0, logit_bias={0: 1.0})


def _pass_on(module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Return the queries in place of attention's output."""
    return query.transpose(1, 2), None


PASSING_ATTENTION = register_attention("spectral_paged_profile", _pass_on)


def history_bytes(geometry: ModelGeometry, max_model_len: int, itemsize: int) -> int:
    """Return the bytes of the transient K and V that prompt chunks attend to, of one layer."""
    tokens = max(HISTORY_TOKENS, max_model_len)
    return 2 * tokens * geometry.num_kv_heads * geometry.head_dim * itemsize


def graph_bytes(
    geometry: ModelGeometry,
    format: PageFormat,
    ops: PageOps,
    device: torch.device,
    *,
    num_rows: int,
    max_model_len: int,
    memory: int,
    shares_reads: bool = False,
) -> int:
    """Return the bytes that the largest graph of a decode step holds for attention and logits.

    Graphs share their memory, because they run one after the other.

    Args:
        num_rows: sequences of the largest batch.
        memory: bytes of the device, which bound the pages that a step can read.
        shares_reads: tiles of two or more sequences read pages in the place of sequences.
    """
    logits = 4 * num_rows * geometry.vocab_size
    if not format.seals:
        return logits
    asked = num_rows * (max_model_len // BLOCK_TOKENS)
    held = memory // (format.page_bytes * geometry.num_layers)
    entries = min(asked, held)
    return logits + ops.decode_scratch_bytes(
        format.layout,
        geometry.num_q_heads,
        device,
        num_seqs=num_rows,
        max_entries=graph_capacity(entries),
        max_shared=graph_capacity(entries // 2) if shares_reads else 0,
    )


@torch.inference_mode()
def activation_bytes(
    model: Any,
    geometry: ModelGeometry,
    format: PageFormat,
    *,
    num_tokens: int,
    num_rows: int,
    max_model_len: int,
    shares_reads: bool = False,
) -> int:
    """Return the peak bytes of a step of `num_tokens` tokens that samples `num_rows`, 0 off CUDA.

    The step runs without attention. Its history buffer and the memory of CUDA graphs are added,
    with `shares_reads` of graphs with tiles.
    """
    device = model.device
    if device.type != "cuda":
        return 0
    num_rows = min(num_rows, num_tokens)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with use_attention(model, PASSING_ATTENTION):
        places = torch.arange(num_tokens, device=device)
        logits = model(
            input_ids=torch.zeros_like(places).unsqueeze(0),
            position_ids=(places % max_model_len).unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            logits_to_keep=places[:num_rows],
        ).logits[0]
    state = SamplingState()
    held = [state.hold(row, COSTLY, logits, prompt=(), output=()) for row in range(num_rows)]
    rows = [SampleRow(COSTLY, 0, 0, (), *tables) for tables in held]
    SampledTokens(logits.float(), rows, state).get()
    peak = torch.cuda.max_memory_allocated(device) - before
    del logits, state
    torch.cuda.empty_cache()
    history = history_bytes(geometry, max_model_len, model.dtype.itemsize)
    graphs = graph_bytes(
        geometry,
        format,
        page_ops(device),
        device,
        num_rows=num_rows,
        max_model_len=max_model_len,
        memory=torch.cuda.mem_get_info(device)[1],
        shares_reads=shares_reads,
    )
    return peak + history + graphs + MODULE_BYTES
