"""The options of a cache and of an `LLM`, declared once for callables and for the command line.

```
LLM(model, max_num_seqs=64)                                  by name
LLM(model, cache_options=CacheOptions(max_num_seqs=64))      as an object, for several callables
spectral-paged serve MODEL --max-num-seqs 64                 by every command that loads a model
```
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict

from spectral_paged.errors import InvalidRequestError, shown, suggestion
from spectral_paged.options.command_line import further_names, option
from spectral_paged.options.readers import bytes_of, num_tokens, parse_bytes, positive
from spectral_paged.options.speculative_config import SpeculativeConfig
from spectral_paged.options.vllm_names import instead_of

if TYPE_CHECKING:
    import torch

    from spectral_paged.pages import PageFormat, SharedBasis

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m"


# option -> a value of vLLM's -> the one that asks for the same here
_VLLM_VALUES: dict[str, dict[str, str | None]] = {
    "generation_config": {"vllm": "none"},
    "quantization": {"gguf": None},  # reading the file does all that it asks for
}


def _read(name: str) -> Callable[[str], str | None]:
    """Return the reader of an option that has values of vLLM's."""
    return lambda text: _VLLM_VALUES[name].get(text, text)


# annotation of a field -> (the values as an error message names them, True for such a value)
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer", lambda value: type(value) is int),
    "int | None": ("an integer or None", lambda value: value is None or type(value) is int),
    "int | str | None": (
        "an integer, such as 34359738368, or a text such as '32GiB', or None",
        lambda value: value is None or (type(value) is int and value > 0),
    ),
    "int | str": (
        "an integer, such as 34359738368, or a text such as '32GiB'",
        lambda value: type(value) is int and value > 0,
    ),
    "str | Path | None": (
        "a path or None",
        lambda value: value is None or isinstance(value, str | Path),
    ),
    "str | None": ("a text or None", lambda value: value is None or isinstance(value, str)),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "Sequence[int]": (
        "a list of whole numbers",
        lambda value: isinstance(value, Sequence) and all(type(item) is int for item in value),
    ),
    "Sequence[str]": (
        "a list of texts",
        lambda value: (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(isinstance(item, str) for item in value)
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The options of a cache, the same in `LLM`, `SpectralKVCache` and the integrations.

    `SpectralKVCache` runs no model: it must be told `kv_cache_bytes`, and takes a `SharedBasis` or
    `online` as its calibration.

    Attributes:
        kv_cache_bytes: bytes of all pages together, allocated once; default: the part of
            `gpu_memory_utilization` that is free on a GPU, 1GiB on a CPU.
        max_num_seqs: most sequences in the cache at a time.
        max_model_len: longest sequence in tokens, prompt and completion together; default: all
            positions of the model, or of the rotary tables.
        exempt_layers: numbers of the layers that stay exact; default: none.
        calibration: the calibration for formats with a shared basis or calibrated weights. `auto`,
            the default, calibrates a model on the package's own text once and keeps the result in
            the cache folder; the path of a file that `spectral-paged calibrate` wrote; `online`
            takes the basis from the first blocks that are sealed (formats with
            `dim_weighting="none"`, so none of the presets); in Python also a `SharedBasis`.
        enable_prefix_caching: share cached tokens between sequences with a common prefix. Must be
            off if `prefill_segment` is 0.
        disable_cascade_attn: read the pages of each sequence for it alone. Otherwise sequences of
            a decode step that begin with the same pages read them together (prefix hits, `n`
            completions, beams). `--no-disable-cascade-attn` switches that on.
        kv_host_memory: bytes of host memory (also a text such as `32GiB`) for prefixes beyond those
            that the cache has room for, allocated once, and pinned for CUDA; default: none. Prompts
            that begin alike are then loaded instead of computed. Needs `enable_prefix_caching`.
        kv_store: folder in which prefixes outlive the process, and which other processes may share;
            default: none. It is made if it is not there. Needs `enable_prefix_caching`. What goes
            there passes through `kv_host_memory`, by default then 1GiB.
        kv_store_size: most bytes of the folder's records together (also a text such as `1TiB`).
        model_fingerprint: separates the pages of models in a `kv_store`; default: a digest of the
            model's weights. A `SpectralKVCache` of your own must be told, because it has no model.
        debug_poison: fill freed slots with NaN bytes, so that a stale read shows.
    """

    kv_cache_bytes: int | None = field(
        default=None,
        metadata=option(parse_bytes, also=["--kv-cache-memory-bytes"], metavar="BYTES"),
    )
    max_num_seqs: int = field(default=256, metadata=option(positive, metavar="N"))
    max_model_len: int | None = field(default=None, metadata=option(num_tokens, metavar="TOKENS"))
    exempt_layers: Sequence[int] = field(
        default=(),
        metadata=option(int, also=["--kv-cache-dtype-skip-layers"], nargs="+", metavar="LAYER"),
    )
    calibration: SharedBasis | str | Path | None = field(default="auto", metadata=option())
    enable_prefix_caching: bool = field(
        default=True, metadata=option(bool, also=["--prefix-caching"])
    )
    disable_cascade_attn: bool = field(default=True, metadata=option(bool))
    kv_host_memory: int | str | None = field(
        default=None, metadata=option(parse_bytes, metavar="BYTES")
    )
    kv_store: str | Path | None = field(default=None, metadata=option(metavar="FOLDER"))
    kv_store_size: int | str = field(
        default=64 << 30, metadata=option(parse_bytes, metavar="BYTES")
    )
    model_fingerprint: str | None = field(default=None, metadata=option(metavar="NAME"))
    debug_poison: bool = field(default=False, metadata=option(bool))

    def __post_init__(self) -> None:
        """Refuse values of another type; integers of numpy and torch become Python's, and texts
        such as `32GiB` become numbers of bytes.

        Raises:
            InvalidRequestError: names the option, its value and what it takes.
        """
        for known in fields(self):
            rule = _TYPES.get(str(known.type))
            value = getattr(self, known.name)
            if rule is not None and "integer" in rule[0] and hasattr(value, "__index__"):
                value = value if isinstance(value, bool) else index(value)
                object.__setattr__(self, known.name, value)
            if str(known.type).startswith("int | str") and isinstance(value, str):
                value = bytes_of(known.name, value)
                object.__setattr__(self, known.name, value)
            if rule is not None and not rule[1](value):
                raise InvalidRequestError(f"{known.name} is {shown(value)}; it must be {rule[0]}")
        if self.max_num_seqs < 1:
            raise InvalidRequestError(
                f"max_num_seqs is {self.max_num_seqs}; it must be an integer of at least 1"
            )

    @classmethod
    def of(
        cls,
        door: Callable[..., object],
        given: CacheOptions | None,
        named: Mapping[str, Any],
        **fixed: Any,
    ) -> Self:
        """The options of a call of `door`: values in `named`, else in `given`, else defaults.

        Args:
            fixed: options that `door` sets, which a caller may not name.

        Raises:
            TypeError: a name that `door` does not take; the message lists the names it takes.
        """
        all_names = [field.name for field in fields(cls)]
        own = [name for name in all_names if name not in fixed]
        named = cls._by_own_names(named)
        unknown = [name for name in named if name not in own]
        if unknown:
            kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
            taken = inspect.signature(door).parameters.values()
            known = sorted([*own, *(p.name for p in taken if p.kind in kinds)])
            meant = suggestion(unknown[0], known)
            raise TypeError(
                f"{door.__name__} takes no option {shown(unknown[0])}"
                f"{f': {meant}' if meant else '.'} It takes {', '.join(known)}"
            )
        held = {name: getattr(given, name) for name in all_names if hasattr(given, name)}
        return cls(**held | dict(named) | fixed)

    @classmethod
    def _by_own_names(cls, named: Mapping[str, Any]) -> Mapping[str, Any]:
        return named


@dataclass(frozen=True, kw_only=True)
class LLMOptions(CacheOptions):
    """The options of an `LLM`: those of its cache, and how its model is loaded and run.

    Attributes:
        kv_format: format of the pages: a preset such as `spectral-quality`, which `auto` takes and
            which needs no calibration file, or `exact`; in Python also a `PageFormat`.
        device: `cpu`, `cuda` or `cuda:1`; `auto` takes CUDA if it is available.
        dtype: `float32` (also `float`), `bfloat16` or `float16` (also `half`), of weights and
            activations; `auto` is `float32` on a CPU, and on CUDA `bfloat16`, or `float16` where
            the GPU has none.
        quantization: `fp8` quantizes the weights of linear layers to FP8 as they are loaded, and
            multiplies on FP8 tensor cores (compute capability 8.9 or more); `fp8-emulated` rounds
            in the same way and multiplies in fp32, on any device; `bitsandbytes` has 4 bits a
            weight (NF4), by the package of that name; default: weights as they are.
        gpu_memory_utilization: share of GPU memory, above 0 and at most 1, for weights, cache and a
            step's activations, which are measured by running a step as large as the budgets allow.
        max_num_batched_tokens: most tokens that a step computes. `max_num_seqs` is the limit on its
            sequences.
        prefill_segment: number of prompt tokens whose queries see each other exactly, a multiple of
            512 (presets only).
        enforce_eager: use neither CUDA graphs nor `torch.compile`. A CPU uses neither anyway.
        compile_layers: `torch.compile` the model's layers on CUDA, which takes about 20 seconds at
            start.
        async_scheduling: on CUDA, queue a step before the tokens of the one before are fetched.
        trust_remote_code: run Python code that comes with the model. Otherwise such a model is
            refused.
        seed: base of the seeds of requests without a seed.
        max_logprobs: most log-probabilities of a token that a request may ask for; -1 allows all of
            the vocabulary, which take 100 bytes each.
        generation_config: `auto` takes the sampling values of the model's generation config where a
            request names none; `none` (also `vllm`) ignores them. End tokens
            of it count either way.
        allow_special_tokens: special tokens that the text of a message spells (`<|im_end|>`) are
            tokens. Otherwise they are text, so that no message ends its turn and begins another's.
        enable_lora: make room for LoRA adapters, which requests may name.
        max_loras: adapters that are loaded at a time. Each takes memory on the device, of
            `max_lora_rank` in every linear layer.
        max_lora_rank: the highest rank of an adapter.
        lora_modules: adapters that are loaded at the start, as `NAME=FOLDER`: a request names one
            as its model. Default: none.
        speculative_config: draft the next tokens of a sequence by looking up its last ones in what
            it has, and compute several at once: `{"method": "ngram", "num_speculative_tokens": 5,
            "prompt_lookup_max": 4, "prompt_lookup_min": 2}`, on the command line as JSON. Tokens
            stay the same. By default there are no drafts.
    """

    kv_format: str | PageFormat = field(default="auto", metadata=option())
    device: str = field(default="auto", metadata=option())
    dtype: str | torch.dtype = field(default="auto", metadata=option())
    quantization: str | None = field(
        default=None, metadata=option(_read("quantization"), also=["-q"], metavar="METHOD")
    )
    gpu_memory_utilization: float = field(default=0.9, metadata=option(float, metavar="SHARE"))
    max_num_batched_tokens: int = field(default=8192, metadata=option(num_tokens, metavar="TOKENS"))
    prefill_segment: int = field(default=2048, metadata=option(int, metavar="TOKENS"))
    enforce_eager: bool = field(default=False, metadata=option(bool))
    compile_layers: bool = field(default=True, metadata=option(bool))
    async_scheduling: bool = field(default=True, metadata=option(bool))
    trust_remote_code: bool = field(default=False, metadata=option(bool))
    seed: int = field(default=0, metadata=option(int))
    max_logprobs: int = field(default=20, metadata=option(int, metavar="N"))
    generation_config: str = field(
        default="auto", metadata=option(_read("generation_config"), choices=("auto", "none"))
    )
    allow_special_tokens: bool = field(default=False, metadata=option(bool))
    enable_lora: bool = field(default=False, metadata=option(bool))
    max_loras: int = field(default=1, metadata=option(positive, metavar="N"))
    max_lora_rank: int = field(default=16, metadata=option(positive, metavar="RANK"))
    lora_modules: Sequence[str] = field(
        default=(), metadata=option(nargs="+", action="extend", metavar="NAME=FOLDER")
    )
    speculative_config: SpeculativeConfig | Mapping[str, Any] | str | None = field(
        default=None, metadata=option(also=["-sc"], metavar="JSON")
    )

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "speculative_config", SpeculativeConfig.read(self.speculative_config)
        )
        for name, ours in _VLLM_VALUES.items():
            value = getattr(self, name)
            if isinstance(value, str) and value in ours:
                object.__setattr__(self, name, ours[value])
        super().__post_init__()

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config`, which has been read."""
        found = self.speculative_config
        assert found is None or isinstance(found, SpeculativeConfig)
        return found

    @property
    def max_decode_rows(self) -> int:
        """The most tokens of sequences that generate in one step, drafts among them."""
        found = self.speculation
        return self.max_num_seqs if found is None else found.num_rows(self.max_num_seqs)

    @classmethod
    def _by_own_names(cls, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments without those of vLLM's that ask for nothing.

        Raises:
            TypeError: an argument of vLLM's asks for what is not served; says what to do instead.
        """
        own = {known.name for known in fields(cls)}
        further = further_names(cls)
        found, ignored = {}, []
        for name, value in named.items():
            name = further.get(name, name)
            refused = None if name in own else instead_of(name, value)
            if refused:
                raise TypeError(refused)
            if refused is None:
                found[name] = value
            else:
                ignored.append(name)
        if ignored:
            logger.info("%s: nothing is asked for by these values", ", ".join(ignored))
        return found


class CacheOptionsDict(TypedDict, total=False):
    """The fields of `CacheOptions` as keywords of a call; for type checkers and editors."""

    kv_cache_bytes: int | None
    max_num_seqs: int
    max_model_len: int | None
    exempt_layers: Sequence[int]
    calibration: SharedBasis | str | Path | None
    enable_prefix_caching: bool
    disable_cascade_attn: bool
    kv_host_memory: int | str | None
    kv_store: str | Path | None
    kv_store_size: int | str
    model_fingerprint: str | None
    debug_poison: bool


class LLMOptionsDict(CacheOptionsDict, total=False):
    """The fields of `LLMOptions` as keywords of a call; for type checkers and editors."""

    kv_format: str | PageFormat
    device: str
    dtype: str | torch.dtype
    quantization: str | None
    gpu_memory_utilization: float
    max_num_batched_tokens: int
    prefill_segment: int
    enforce_eager: bool
    compile_layers: bool
    async_scheduling: bool
    trust_remote_code: bool
    seed: int
    max_logprobs: int
    generation_config: str
    allow_special_tokens: bool
    enable_lora: bool
    max_loras: int
    max_lora_rank: int
    lora_modules: Sequence[str]
    speculative_config: SpeculativeConfig | Mapping[str, Any] | str | None
