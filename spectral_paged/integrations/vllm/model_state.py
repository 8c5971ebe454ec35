"""vLLM's model state, in which every step of the model runner opens and closes a step of the
cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from spectral_paged.integrations.vllm.passes import CapturedPass, EmptyPass, OpenPass, Pass
from spectral_paged.integrations.vllm.runtime import PagedRuntime, timed


class SpectralModelState(DefaultModelState):
    """Model runner V2's state of a decoder, with the steps of `SpectralKVCache`.

    ```
    cudagraph mode     real step                       warm-up without sequences
    FULL               static inputs are filled        static inputs of no tokens
    PIECEWISE, NONE    layers attend the open step     layers return zeros
    capture            -                               static inputs of no tokens
    ```
    """

    @timed
    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
    ) -> dict[str, Pass]:
        runtime = PagedRuntime.get()
        full = cudagraph_mode == CUDAGraphMode.FULL
        if for_capture:
            runtime.inputs.clear()
            made: Pass = CapturedPass(runtime, input_batch.num_tokens_after_padding, runtime.room)
        elif not runtime.knows(input_batch.req_ids):
            if full:
                runtime.inputs.clear()
                runtime.num_blocks = 0
            made = EmptyPass()
        else:
            counts = input_batch.num_scheduled_tokens.tolist()
            starts = input_batch.num_computed_tokens_np
            plan = runtime.begin_step(input_batch.req_ids, counts, starts)
            if full:
                nothing = [0] * len(counts)  # vLLM's graph has ids and positions of its own
                runtime.inputs.fill(nothing, nothing)
                runtime.num_blocks = runtime.inputs.num_blocks
                made = EmptyPass()
            else:
                made = OpenPass(runtime, plan.num_tokens)
        return {name: made for groups in attn_groups for one in groups for name in one.layer_names}

    @timed
    def postprocess_state(
        self, idx_mapping: Tensor, num_sampled: Tensor, num_computed_tokens: Tensor | None = None
    ) -> None:
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        PagedRuntime.get().close_step()
