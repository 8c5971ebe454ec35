"""vLLM as a backend of throughput runs, with its own cache or with pages.

```
vllm                 its own cache in the model's dtype
vllm:fp8             its own cache with --kv-cache-dtype fp8, and so on for every such name
vllm-pages           pages of the format `auto`
vllm-pages:exact     pages of a preset
```
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_paged.benchmarks.throughput.backends import Served, Times, fitting, needs_calibration
from spectral_paged.benchmarks.throughput.random_models import is_random, random_config
from spectral_paged.benchmarks.throughput.workload import Job
from spectral_paged.errors import InvalidRequestError
from spectral_paged.integrations.vllm import check_release, engine_args
from spectral_paged.models.loader import LoadedModel, resolve
from spectral_paged.models.weight_quantization import FP8
from spectral_paged.options import LLMOptions

OWN, PAGES = "vllm", "vllm-pages"
WARM_UP_LEN = 3000  # tokens of a prompt: past a segment, so that pages are sealed and read


def is_vllm(backend: str) -> bool:
    """True for the name of a backend that runs in vLLM."""
    return backend.partition(":")[0] in (OWN, PAGES)


def byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 256 bytes, for a model whose weights, and so words, mean nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


class VLLMServer:
    """A started vLLM that serves one workload after another.

    The model of this process has to leave the GPU before. vLLM loads its own, because weights of
    transformers are not its weights; of a `random:` shape it makes up others.

    Args:
        backend: a name as in this module's picture.
        options: `max_num_seqs`, `max_model_len`, `gpu_memory_utilization`, `kv_cache_bytes`,
            `enforce_eager`, `enable_prefix_caching` and `quantization` are vLLM's too, and
            `kv_host_memory` is its `kv_offloading_size`. All others, the token budget of a step
            among them, are vLLM's defaults, which it chooses for the card.

    Raises:
        MissingPackageError: no vLLM, or one that pages were not tried with.
    """

    def __init__(self, backend: str, loaded: LoadedModel, options: LLMOptions) -> None:
        check_release()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self.backend = backend
        self.max_num_seqs = options.max_num_seqs
        self.pages = backend.startswith(PAGES)
        what = backend.partition(":")[2]
        given: dict[str, Any] = {"max_num_seqs": options.max_num_seqs}
        if self.pages:
            given = engine_args(**given, kv_format=what or "auto")
        elif what:
            given["kv_cache_dtype"] = what
        if options.kv_cache_bytes is not None:
            given["kv_cache_memory_bytes"] = options.kv_cache_bytes
        if options.kv_host_memory is not None:
            given["kv_offloading_size"] = float(options.kv_host_memory) / (1 << 30)
        self._folder = tempfile.TemporaryDirectory(prefix="spectral-paged-vllm-")
        if is_random(loaded.name):
            folder = Path(self._folder.name)
            random_config(loaded.name).save_pretrained(folder)
            byte_tokenizer(folder)
            given["load_format"] = "dummy"
        else:
            folder = Path(resolve(loaded.name))
        start = time.perf_counter()
        self.llm = LLM(
            model=str(folder),
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
            enable_prefix_caching=options.enable_prefix_caching,
            quantization=options.quantization,
            generation_config="vllm",
            disable_log_stats=False,
            seed=0,
            **given,
        )
        self.start_seconds = time.perf_counter() - start
        self._served = 0
        longest = options.max_model_len or WARM_UP_LEN
        self._run([Job([1 + i % 250 for i in range(min(WARM_UP_LEN, longest - 8))], 8)] * 2)

    def capacity(self, num_tokens: int) -> int:
        """The sequences of `num_tokens` that the cache holds at once."""
        if self.pages:
            [held] = self.llm.collective_rpc("page_concurrency", args=(num_tokens,))
            return int(held)
        cache = self.llm.llm_engine.vllm_config.cache_config
        blocks = -(-num_tokens // cache.block_size)
        return int(cache.num_gpu_blocks // blocks)

    def serve(self, jobs: Sequence[Job], *, fit: bool = False) -> Served:
        """Serve all jobs, added at once; greedy, no token ends a request early.

        Args:
            fit: serve only as many jobs as the cache holds at once.

        Raises:
            ArithmeticError: a request ended with tokens missing.
        """
        longest = max(len(job.prompt_token_ids) + job.output_len for job in jobs)
        capacity = self.capacity(longest)
        if fit:
            jobs = fitting(jobs, capacity, self.max_num_seqs)
        before = self._preemptions()
        times, elapsed = self._run(jobs)
        stats: dict[str, Any] = {
            "capacity_sequences": capacity,
            "preemptions": self._preemptions() - before,
            "start_seconds": self.start_seconds,
        }
        return Served(
            elapsed,
            jobs,
            list(times.first.values()),
            times.gaps,
            stats=stats | self.stats(),
            decode_rate=times.decode_rate,
        )

    def stats(self) -> dict[str, Any]:
        """The figures of pages; vLLM's own cache has none."""
        if not self.pages:
            return {}
        [found] = self.llm.collective_rpc("page_stats")
        return dict(found)

    def _run(self, jobs: Sequence[Job]) -> tuple[Times, float]:
        from vllm import SamplingParams

        engine, times = self.llm.llm_engine, Times()
        self._served += 1
        wanted = {}
        begin = time.perf_counter()
        for i, job in enumerate(jobs):
            params = SamplingParams(
                temperature=0.0, max_tokens=job.output_len, ignore_eos=True, detokenize=False
            )
            name = f"{self._served}-{i}"
            wanted[name] = job.output_len
            engine.add_request(name, {"prompt_token_ids": job.prompt_token_ids}, params)
        while engine.has_unfinished_requests():
            times.note(time.perf_counter() - begin, engine.step())
        elapsed = time.perf_counter() - begin
        times.check(self.backend, wanted)
        return times, elapsed

    def _preemptions(self) -> int:
        found = [m for m in self.llm.get_metrics() if "preemption" in m.name]
        return int(sum(getattr(metric, "value", 0) for metric in found))

    def close(self) -> None:
        """End vLLM's process and give its memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        self._folder.cleanup()


def check_backend(
    backend: str, *, decode_only: bool, profile: bool, quantization: str | None
) -> None:
    """Refuse what vLLM does not do in a throughput run.

    Raises:
        InvalidRequestError: contexts are to be made up, sections to be timed, weights quantized by
            a method that is not vLLM's, or pages calibrated on quantized weights.
    """
    if quantization not in (None, FP8):
        raise InvalidRequestError(
            f"--backend {backend} has no --quantization {quantization}: take {FP8}"
        )
    name, _, preset = backend.partition(":")
    if quantization is not None and name == PAGES and needs_calibration(preset or "auto"):
        raise InvalidRequestError(
            f"--backend {backend} makes its calibration of vLLM's weights, which --quantization "
            "makes FP8: name backends without it by --backend"
        )
    if decode_only or profile:
        raise InvalidRequestError(
            f"--backend {backend} computes prompts and times nothing inside: drop --decode-only "
            "and --profile"
        )
