"""`AsyncLLM` serves requests of one process's coroutines, under vLLM's names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from spectral_paged.engine import Prompt, parts_of
from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.llm import LLM
from spectral_paged.options import EngineArgs, LoRARequest
from spectral_paged.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    TextDelta,
)
from spectral_paged.sampling import SamplingParams
from spectral_paged.server.engine_thread import EngineThread
from spectral_paged.server.pending import Generation


class AsyncLLM:
    """An `LLM` whose steps run in a thread of their own while coroutines wait for outputs.

    Args:
        llm: nobody else may use it until `shutdown` has returned.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._engine: EngineThread | None = None
        self._running: dict[str, Generation] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLM:
        """Load a model and make an engine over it."""
        return cls(LLM(engine_args.model, cache_options=engine_args.options))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str = "",
        *,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output as it grows, as its `output_kind` says, until it has ended.

        Closing the iterator aborts the request.

        Raises:
            SpectralPagedError: the prompt can never be served.
            ApiError: the request failed while it ran, or the engine stops.
        """
        if not request_id or request_id in self._running:
            raise InvalidRequestError(
                f"request_id is {shown(request_id)}; give a string that no running request has"
            )
        params = (sampling_params or self.llm.get_default_sampling_params()).clone()
        kind, params.output_kind = params.output_kind, RequestOutputKind.CUMULATIVE
        ids, salt = await asyncio.to_thread(self._prepare, prompt, params)
        generation = await self._thread().submit(
            request_id, [ids], params, cache_salt=salt, streams=True, lora_request=lora_request
        )
        self._running[request_id] = generation
        text = prompt if isinstance(prompt, str) else None
        told = _Told(RequestOutput(request_id, text, ids, [], False, RequestMetrics(0.0)), kind)
        try:
            async for news in generation:
                for item in news:
                    output = told.of(item)
                    if output is not None:
                        yield output
        finally:
            del self._running[request_id]
            generation.close()

    async def abort(self, request_id: str) -> None:
        """End a request, whose iterator raises. Unknown ids are ignored."""
        generation = self._running.get(request_id)
        if generation is not None:
            generation.fail(InvalidRequestError(f"request {shown(request_id)} was aborted"))

    async def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix that no running request holds; return True."""
        await self._thread().call(self.llm.cache.reset_prefix_cache)
        return True

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load a LoRA adapter that stays until `remove_lora`; False: it is loaded already."""
        return await self._thread().call(lambda: self.llm.add_lora(lora_request))

    async def remove_lora(self, lora_int_id: int) -> bool:
        """Unload a LoRA adapter, with which running requests end; False: none has the id."""
        return await self._thread().call(lambda: self.llm.remove_lora(lora_int_id))

    async def list_loras(self) -> set[int]:
        """Return the ids of the LoRA adapters that are loaded."""
        return {request.lora_int_id for request in self.llm.list_loras()}

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Run no steps until `wake_up`, and give memory to others meanwhile: see `LLM.sleep`.

        Requests that come meanwhile wait.
        """
        await self._thread().sleep(level, mode)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Wake up, or only the parts that `tags` name: see `LLM.wake_up`."""
        await self._thread().wake_up(tags)

    async def is_sleeping(self) -> bool:
        return self._thread().is_sleeping

    async def stop(self) -> None:
        """Abort what runs, and wait until the thread has ended."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()

    def shutdown(self) -> None:
        """Let the thread end; what runs gets an error."""
        if self._engine is not None:
            self._engine.ask_to_stop()

    def get_tokenizer(self) -> Any:
        return self.llm.get_tokenizer()

    def _thread(self) -> EngineThread:
        """Return the engine's thread, which the first request starts."""
        if self._engine is None:
            self._engine = EngineThread(self.llm)
            self._engine.start()
        return self._engine

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], str]:
        """Return token ids and salt of a prompt, beside the event loop."""
        engine = self.llm.engine
        body, salt, pinned = parts_of(prompt)
        if pinned:
            raise InvalidRequestError("pinned_spans are for `LLM.generate`: leave them out")
        engine.grammars.prepare([params.structured_outputs])
        cut = params.truncate_prompt_tokens
        return engine.prompt_encoder.encode(body, truncate_prompt_tokens=cut), salt


class _Told:
    """What the pieces of a request say, as outputs of its kind.

    Args:
        output: without completions.
        kind: which outputs there are.
    """

    def __init__(self, output: RequestOutput, kind: RequestOutputKind) -> None:
        self._output, self._kind = output, kind
        self._so_far: dict[int, CompletionOutput] = {}

    def of(self, item: TextDelta | RequestOutput) -> RequestOutput | None:
        if isinstance(item, RequestOutput):
            ended = replace(item, request_id=self._output.request_id, prompt=self._output.prompt)
            return replace(ended, outputs=[]) if self._kind is RequestOutputKind.DELTA else ended
        piece = CompletionOutput(
            item.index,
            item.text,
            item.token_ids,
            logprobs=item.logprobs,
            finish_reason=item.finish_reason,
            text_offsets=item.text_offsets,
        )
        if self._kind is RequestOutputKind.FINAL_ONLY:
            return None
        if self._kind is RequestOutputKind.DELTA:
            return replace(self._output, outputs=[piece])
        before = self._so_far.get(item.index)
        if before is not None:
            piece = _joined(before, piece)
        self._so_far[item.index] = piece
        outputs = [self._so_far[index] for index in sorted(self._so_far)]
        return replace(self._output, outputs=outputs)


def _joined(before: CompletionOutput, piece: CompletionOutput) -> CompletionOutput:
    tables, offsets = before.logprobs, before.text_offsets
    return replace(
        piece,
        text=before.text + piece.text,
        token_ids=before.token_ids + piece.token_ids,
        logprobs=None if tables is None else tables + (piece.logprobs or []),
        text_offsets=None if offsets is None else offsets + (piece.text_offsets or []),
    )
