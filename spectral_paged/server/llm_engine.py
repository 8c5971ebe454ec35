"""`LLMEngine` runs requests a step at a time, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from spectral_paged.engine import Metric, Prompt, counted_refusal, parts_of
from spectral_paged.llm import LLM
from spectral_paged.options import EngineArgs, LoRARequest
from spectral_paged.outputs import RequestOutput
from spectral_paged.sampling import SamplingParams


class LLMEngine:
    """An `LLM` whose caller runs its steps.

    Args:
        llm: nobody else may use it meanwhile.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        """Load a model and make an engine over it."""
        return cls(LLM(engine_args.model, cache_options=engine_args.options))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> str:
        """Queue a prompt and return its id.

        Raises:
            SpectralPagedError: it can never be served. Nothing is queued.
        """
        engine = self.llm.engine
        with counted_refusal(engine.counters, request_id):
            body, salt, pinned = parts_of(prompt)
        params = params or self.llm.get_default_sampling_params()
        engine.add_request(
            request_id,
            body,
            params,
            cache_salt=salt,
            pinned_spans=pinned,
            lora_request=lora_request,
        )
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step; return what requests have to tell, as their `output_kind` says."""
        return self.llm.engine.step()

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests, of which no output tells. Unknown ids are ignored."""
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            self.llm.engine.abort(request_id)

    def has_unfinished_requests(self) -> bool:
        return self.llm.engine.has_unfinished()

    def get_num_unfinished_requests(self) -> int:
        return len(self.llm.engine.requests.by_id)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load a LoRA adapter that stays until `remove_lora`; False: it is loaded already."""
        return self.llm.add_lora(lora_request)

    def remove_lora(self, lora_int_id: int) -> bool:
        """Unload a LoRA adapter, with which running requests end; False: none has the id."""
        return self.llm.remove_lora(lora_int_id)

    def list_loras(self) -> set[int]:
        """Return the ids of the LoRA adapters that are loaded."""
        return {request.lora_int_id for request in self.llm.list_loras()}

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Run no steps until `wake_up`, and give memory to others meanwhile: see `LLM.sleep`."""
        self.llm.sleep(level, mode)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Wake up, or only the parts that `tags` name: see `LLM.wake_up`."""
        self.llm.wake_up(tags)

    def is_sleeping(self) -> bool:
        return bool(self.llm.engine.sleep.parts)

    def get_metrics(self) -> list[Metric]:
        """Return the figures of the engine: see `LLM.get_metrics`."""
        return self.llm.get_metrics()

    def get_tokenizer(self) -> Any:
        return self.llm.get_tokenizer()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix that no running request holds; return True."""
        return self.llm.reset_prefix_cache()
