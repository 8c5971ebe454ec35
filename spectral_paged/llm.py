"""`LLM` is the offline API: batch generation, chat and streams over one model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from os import PathLike
from typing import Any, Unpack

from tqdm import tqdm

from spectral_paged.engine import (
    BeamSearch,
    Callers,
    ChatOptions,
    Conversation,
    Engine,
    Inbox,
    Message,
    Metric,
    Prompt,
    TextDeltas,
    Turns,
    conversations,
    counted_refusal,
    metrics_of,
    params_list,
    parts_of,
    prompt_list,
    take_snapshot,
)
from spectral_paged.errors import SpectralPagedError
from spectral_paged.models.generation import end_tokens, sampling_defaults
from spectral_paged.models.given_model import given_model
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.lora import of_llm
from spectral_paged.models.ready_model import ReadyModel, ready_model
from spectral_paged.models.runner import ModelRunner
from spectral_paged.options import (
    DEFAULT_MODEL,
    CacheOptions,
    LLMOptions,
    LLMOptionsDict,
    LoRARequest,
    LoRARequests,
    instead_of_method,
    lora_list,
)
from spectral_paged.outputs import BeamSearchOutput, RequestOutput, RequestOutputKind, TextDelta
from spectral_paged.pool.weak_method import WeakMethod
from spectral_paged.sampling import BeamSearchParams, SamplingParams
from spectral_paged.scheduler import SchedulerConfig

# options that a loaded model does not take
LOADING = ("device", "dtype", "quantization", "trust_remote_code")


class LLM:
    """A model with a spectral paged KV cache.

    Threads may call `generate`, `chat` and `stream` at once: steps take turns, and each step serves
    the requests of all callers.

    Args:
        model: alias of the embedded default, hub id, local folder, path to a `.gguf` file, or a
            `LoadedModel`, which has its own device, dtype and quantization.
        cache_options: `CacheOptions` or `LLMOptions`, as an object.
        **options: the fields of `LLMOptions` by name (`kv_format`, `kv_cache_bytes`, `device`,
            `max_num_seqs`, `max_model_len`, ...), which are also options of the command line.

    Raises:
        TypeError: an option does not exist.
        UnknownModelError, UnsupportedModelError, CorruptFileError, FormatError, CapacityError.
    """

    def __init__(
        self,
        model: str | PathLike[str] | LoadedModel = DEFAULT_MODEL,
        *,
        cache_options: CacheOptions | None = None,
        **options: Unpack[LLMOptionsDict],
    ) -> None:
        ready = ready_model(model, LLMOptions.of(LLM, cache_options, options))
        try:
            self._start(ready)
        except BaseException:
            ready.close()
            raise

    def _start(self, ready: ReadyModel) -> None:
        """Make cache, runner and engine of a model."""
        loaded, chosen, self.adapters = ready.loaded, ready.options, ready.adapters
        self.model_name = loaded.name
        self.allow_special_tokens = chosen.allow_special_tokens
        self.sampling_defaults = sampling_defaults(loaded.model, chosen.generation_config)
        self.cache = ready.cache()
        self._runner = ModelRunner(
            loaded.model,
            self.cache,
            enforce_eager=chosen.enforce_eager,
            compile_layers=chosen.compile_layers,
            adapters=None if ready.adapters is None else ready.adapters.tokens,
            max_decode_rows=chosen.max_decode_rows,
        )
        self.engine = Engine(
            self._runner,
            self.cache,
            tokenizer=loaded.tokenizer,
            scheduler_config=SchedulerConfig(
                chosen.max_num_seqs,
                chosen.max_num_batched_tokens,
                max_decode_rows=chosen.max_decode_rows,
            ),
            eos_token_ids=end_tokens(loaded.model, loaded.tokenizer, loaded.geometry.vocab_size),
            vocab_size=loaded.geometry.vocab_size,
            seed=chosen.seed,
            max_logprobs=chosen.max_logprobs,
            async_scheduling=chosen.async_scheduling and self.cache.device.type == "cuda",
            adapters=ready.adapters,
            speculative_config=chosen.speculation,
        )
        self._tokenizer = loaded.tokenizer
        self._request_numbers = itertools.count()
        self._turns = Turns()
        self._callers = Callers(WeakMethod(self._engine_now), self._turns)
        self._enqueued: list[Inbox] = []

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any = None, **options: Any) -> LLM:
        """Make an LLM over a loaded transformers model, whose attention is replaced.

        Args:
            model: with `enable_lora` also one of PEFT, whose adapters requests may name.
            options: those of the constructor, without `device`, `dtype` and `trust_remote_code`.

        Raises:
            TypeError: an option does not exist, or is one of loading.
            UnsupportedModelError: the model is none of these, or has adapters.
        """
        if of_loading := [name for name in LOADING if name in options]:
            raise TypeError(f"from_model takes no {of_loading[0]}: the model is loaded already")
        return cls(given_model(model, tokenizer), **options)

    def _engine_now(self) -> Engine:
        return self.engine

    def warm_up(self, *, num_seqs: int | None = None, num_tokens: int | None = None) -> int:
        """Compile kernels and capture decode graphs now, instead of when a step first needs them.

        Graphs are captured for up to `num_seqs` sequences of up to `num_tokens` tokens. Returns
        the number of graphs (0 on the CPU).
        """
        with self._turns:
            self.engine.sleep.check()
            most = min(num_seqs or self.cache.max_num_seqs, self.cache.max_num_seqs)
            drafts = self.engine.speculation
            return self._runner.warm_up(
                most if drafts is None else drafts.config.num_rows(most),
                min(num_tokens or self.cache.max_model_len, self.cache.max_model_len),
            )

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Run no steps until `wake_up`; give a GPU's memory to others meanwhile.

        Level 0 runs no steps; level 1 forgets prompts that no lower tier has, frees the memory of
        pages, and on a GPU moves weights to host memory. Mode `abort` fails the requests and beam
        searches of other callers, `wait` runs them to their end, and `keep` (level 0) lets requests
        wait.

        Raises:
            InvalidRequestError: level 2, which drops the weights, or an unknown level or mode.
        """
        with self._turns:
            self.engine.sleep.begin(level, mode, self._callers.finish)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Wake up; `tags` (`weights`, `kv_cache`, `scheduling`) name a part to bring back now."""
        with self._turns:
            self.engine.sleep.end(tags)

    def close(self) -> None:
        """Drop all requests, free pages, host memory and graphs, and restore the model.

        Later use of the LLM raises `SpectralPagedError`. Closing it again does nothing.
        """
        if "engine" in vars(self):
            with self._turns:
                self._runner.close()
                self.cache.close()
                if self.adapters is not None:
                    self.adapters.close()
                del self.engine, self.cache, self._runner, self._callers, self.adapters

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name in ("engine", "cache", "_runner", "_callers", "adapters"):
            raise SpectralPagedError("this LLM was closed: make another")
        instead = instead_of_method(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{instead}")

    # ---- generation ----------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
    ) -> list[RequestOutput]:
        """Complete every prompt and return the outputs in prompt order.

        Any error raised here, an interrupt included, has the finished outputs as `error.outputs`,
        in prompt order (None for the others).

        Args:
            prompts: one or many; text, token ids (an array or tensor too), what a tokenizer
                returned, or `{"prompt": ...}` /
                `{"prompt_token_ids": ..., "cache_salt": ..., "pinned_spans": [(start, end)]}`;
                pinned spans are positions of tokens that stay exact, by whole blocks of 512. Many
                are a list, a column of a table, or an array with a row for each, of which every
                token counts: a tokenizer's whole answer says which are pads.
            sampling_params: one for all, or one for each prompt; None: those of
                `get_default_sampling_params`.
            lora_request: the LoRA adapter of all, or one for each prompt (None: the base model).

        Raises:
            SpectralPagedError: the first error of any request, after all others have finished.
        """
        return self._complete(prompt_list(prompts), sampling_params, use_tqdm, lora_request)

    def prefill(self, prompts: Prompt | Iterable[Prompt], **how: Any) -> list[RequestOutput]:
        """Compute prompts and keep them, in the cache and in all of its store, for later requests.

        Steps wait for the disk. Outputs say in `metrics` what was kept before. `use_tqdm`,
        `lora_request` and errors are as of `generate`.
        """
        with self.cache.keeping_all():
            return self.generate(prompts, SamplingParams(max_tokens=1), **how)

    def _complete(
        self,
        prompts: Sequence[Prompt | Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None,
        use_tqdm: bool,
        lora_request: LoRARequests,
    ) -> list[RequestOutput]:
        errors: list[SpectralPagedError] = []
        inbox = self._queue(prompts, sampling_params, lora_request, errors)
        return self._callers.outputs(inbox, len(prompts), errors, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        use_tqdm: bool = True,
        allow_special_tokens: bool | None = None,
        lora_request: LoRARequests = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Complete one conversation or many, formatted by the tokenizer's chat template.

        Args:
            messages: `{"role": ..., "content": ...}`; content is text, or a list of text parts,
                which are joined by line ends.
            allow_special_tokens: None: as the LLM was made.
            lora_request: as in `generate`.
            options: the fields of `ChatTemplate` (`tools`, `chat_template_kwargs`, ...).

        Raises:
            SpectralPagedError: as in `generate`.
        """
        talks = conversations(messages, allow_special_tokens, **options)
        return self._complete(talks, sampling_params, use_tqdm, lora_request)

    def chat_tokens(
        self,
        messages: object,
        *,
        allow_special_tokens: bool | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the token ids of a conversation, up to the start of the assistant's turn.

        Args:
            allow_special_tokens: None: as the LLM was made.
            options: as `PromptEncoder.encode_chat` has them.

        Raises:
            InvalidRequestError, PromptTooLongError: as `PromptEncoder.encode_chat` does.
        """
        if allow_special_tokens is None:
            allow_special_tokens = self.allow_special_tokens
        with self._turns:
            encoder = self.engine.prompt_encoder
            return encoder.encode_chat(
                messages, allow_special_tokens=allow_special_tokens, **options
            )

    def enqueue(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        lora_request: LoRARequests = None,
    ) -> list[str]:
        """Queue prompts without running a step; return the ids of their requests.

        Steps of other calls serve them too. `wait_for_completion` returns their outputs.

        Raises:
            SpectralPagedError: a prompt is refused; none of them is queued.
        """
        inbox = self._queue(prompt_list(prompts), sampling_params, lora_request, None)
        self._enqueued.append(inbox)
        return list(inbox.places)

    def wait_for_completion(self, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Run steps until all prompts of `enqueue` are complete; return outputs in their order.

        Raises:
            SpectralPagedError: as in `generate`.
        """
        inboxes, self._enqueued = self._enqueued, []
        joined = self._callers.join(inboxes)
        return self._callers.outputs(joined, len(joined.places), [], use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        lora_request: LoRARequests = None,
    ) -> list[BeamSearchOutput]:
        """Return the best sequences of each prompt in turn; other callers' steps run in between.

        Raises:
            SpectralPagedError: a prompt can never be served, or the beams do not fit.
        """
        listed = prompt_list(prompts)
        pairs = list(zip(listed, lora_list(lora_request, len(listed)), strict=True))
        return [
            BeamSearchOutput(BeamSearch.of_prompt(self.engine, prompt, params, self._turns, lora))
            for prompt, lora in tqdm(pairs, "beam search", unit="prompt", disable=not use_tqdm)
        ]

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix that no running request holds; return True."""
        with self._turns:
            self.cache.reset_prefix_cache()
        return True

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        lora_request: LoRARequests = None,
    ) -> Iterator[TextDelta]:
        """Yield pieces of text of all prompts, once no later stop string can remove them.

        Closing the iterator aborts running requests. A refused prompt raises before any piece. A
        request that fails while it runs yields a last piece with its error.
        """
        kind, listed = RequestOutputKind.CUMULATIVE, prompt_list(prompts)
        inbox = self._queue(listed, sampling_params, lora_request, None, kind)
        deltas = TextDeltas(self.engine)
        yield from self._callers.pieces(inbox, lambda o: deltas.of(o, inbox.places[o.request_id]))

    def _queue(
        self,
        prompts: Sequence[Prompt | Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None,
        lora_request: LoRARequests,
        errors: list[SpectralPagedError] | None,
        kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> Inbox:
        params = params_list(sampling_params, len(prompts), self.get_default_sampling_params())
        loras = lora_list(lora_request, len(prompts))
        self.engine.grammars.prepare(p.structured_outputs for p in params)
        parts = zip(prompts, [p.told_as(kind) for p in params], loras, strict=True)
        return self._callers.queue([partial(self._submit, *part) for part in parts], errors)

    def _submit(
        self, prompt: Prompt | Conversation, params: SamplingParams, lora: LoRARequest | None
    ) -> str:
        request_id = f"request-{next(self._request_numbers)}"
        with counted_refusal(self.engine.counters, request_id):
            if isinstance(prompt, Conversation):
                prompt = self.chat_tokens(
                    prompt.messages,
                    allow_special_tokens=prompt.allow_special_tokens,
                    truncate_prompt_tokens=params.truncate_prompt_tokens,
                    **prompt.options,
                )
            body, salt, pinned = parts_of(prompt)
        self.engine.add_request(
            request_id, body, params, cache_salt=salt, pinned_spans=pinned, lora_request=lora
        )
        return request_id

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load a LoRA adapter that stays until `remove_lora`; False: it is loaded already."""
        with self._turns:
            self.engine.sleep.check()
            return of_llm(self.adapters).load(lora_request)

    def remove_lora(self, lora_int_id: int) -> bool:
        """Unload a LoRA adapter, with which running requests end; False: none has the id."""
        with self._turns:
            return of_llm(self.adapters).unload(lora_int_id)

    def list_loras(self) -> list[LoRARequest]:
        """Return the LoRA adapters that are loaded."""
        return [] if self.adapters is None else self.adapters.requests

    # ---- questions -----------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of a request that names none: the model's generation config's."""
        return SamplingParams(**self.sampling_defaults)

    def get_metrics(self) -> list[Metric]:
        """Return the figures of `/metrics` as vLLM's objects: `Counter`, `Gauge`, `Histogram`."""
        return metrics_of(take_snapshot(self))

    def stats(self) -> dict[str, object]:
        """Return the backend, the capacity and counts since construction (pages, preemptions)."""
        return self.engine.stats()
