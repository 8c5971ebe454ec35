"""lm-eval's tasks over an `LLM`, so that a format's claims are checked on one's own model.

```
python -m spectral_paged.integrations.lm_eval --model spectral-paged \
    --model_args pretrained=MODEL,kv_format=spectral-quality --tasks TASK
```

Log-likelihoods are computed as a request's are: a query sees the blocks before its segment as
pages. Texts that are shorter than `prefill_segment` (2,048 tokens) and the tail read none.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from spectral_paged.errors import missing_extra
from spectral_paged.llm import LLM
from spectral_paged.options import DEFAULT_MODEL
from spectral_paged.outputs import RequestOutput
from spectral_paged.sampling import RULES, SamplingParams

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, maybe_truncate, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise missing_extra("this model class needs the package lm-eval", "lm-eval") from error

logger = logging.getLogger(__name__)

NAME = "spectral-paged"
# of a generation config of a task, with no meaning for a request of its own
IGNORED = {"do_sample", "until", "max_gen_toks", "num_return_sequences"}
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model(NAME)
class SpectralPagedLM(TemplateLM):
    """A model of lm-eval whose requests an `LLM` serves.

    Args:
        pretrained: a model as `LLM` takes it, or an `LLM`.
        batch_size, max_batch_size: taken for lm-eval's sake; the engine batches by itself.
        device: as `LLM` takes it. lm-eval names `cuda:0` where its user names none, so without CUDA
            it is the CPU, which is told.
        max_gen_toks: tokens of an answer whose task names no number.
        add_bos_token: texts begin with the tokenizer's special tokens.
        **options: the fields of `LLMOptions` (`kv_format`, `prefill_segment`, ...).

    Raises:
        TypeError: an option does not exist.
    """

    def __init__(
        self,
        pretrained: str | LLM = DEFAULT_MODEL,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str = "auto",
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if device.startswith("cuda") and not torch.cuda.is_available():
            logger.warning("lm-eval asks for %s, and there is none: the CPU computes", device)
            device = "auto"
        if not isinstance(pretrained, LLM):
            pretrained = LLM(pretrained, device=device, **options)
        self.llm = pretrained
        self.tokenizer = self.llm.get_tokenizer()
        self.max_length = self.llm.cache.max_model_len
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token

    @property
    def eot_token_id(self) -> int:
        found = self.tokenizer.eos_token_id
        return int(found if found is not None else self.llm.engine.eos_token_ids[0])

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            begun = self.tokenizer.bos_token or ""
            add_special_tokens = self.add_bos_token and not (begun and string.startswith(begun))
        encoded = self.tokenizer(string, add_special_tokens=add_special_tokens)
        return list(encoded["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    # ---- likelihoods ---------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **how: Any
    ) -> list[tuple[float, bool]]:
        """Return for each request the sum of its continuation's log-probabilities, and whether all
        of its tokens are the most probable ones. A context that is too long loses its beginning."""
        most = self.max_length - 1  # an engine has room for one token behind a prompt
        whole = [(context + target)[-most:] for _, context, target in requests]
        params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0, detokenize=False)
        read = self._pages_read()
        outputs = self.llm.generate(whole, params, use_tqdm=not disable_tqdm)
        if self._pages_read() == read and self.llm.cache.format.seals:
            logger.warning(
                "no query of these %d texts reads a page, because none is long enough: this says "
                "nothing about the format. Take longer contexts, or prefill_segment=512",
                len(whole),
            )
        found = []
        for (key, _, target), output in zip(requests, outputs, strict=True):
            answer = _score(output, len(target))
            found.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _pages_read(self) -> int:
        read = self.llm.stats()["pages_attended"]
        assert isinstance(read, int)
        return read

    def loglikelihood_rolling(
        self, requests: Iterable[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, cut into windows of the model's length."""
        windows: list[Scored] = []
        counts, texts = [], [request.args[0] for request in requests]
        for text in texts:
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # and the token before a window
                context_len=1,
            )
            parts = [make_disjoint_window(window) for window in cut]
            counts.append(len(parts))
            windows += [(None, context, target) for context, target in parts]
        sums = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        found = [sum(next(sums)[0] for _ in range(count)) for count in counts]
        for text, answer in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return found

    # ---- generation ----------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that each request generates, up to its first stop string."""
        prompts, params = [], []
        for request in requests:
            text, asked = request.args
            given = normalize_gen_kwargs(asked, default_max_gen_toks=self.max_gen_toks)
            tokens, most = maybe_truncate(
                self.tok_encode(text),
                max_gen_toks=given["max_gen_toks"],
                max_model_len=self.max_length,
            )
            prompts.append(tokens)
            params.append(self._params(given, most))
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, given: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        own = {name: value for name, value in given.items() if name not in IGNORED}
        if unknown := sorted(own.keys() - RULES.keys()):
            logger.warning("generation_kwargs that have no meaning here: %s", ", ".join(unknown))
        stop = [*handle_stop_sequences(given.get("until"), eos=None)]
        values = {name: value for name, value in own.items() if name in RULES}
        if not given["do_sample"]:
            values["temperature"] = 0.0
        return SamplingParams(**values | {"stop": stop, "max_tokens": max_tokens})


def _score(output: RequestOutput, num_scored: int) -> tuple[float, bool]:
    assert output.prompt_logprobs is not None
    total, greedy = 0.0, True
    first = len(output.prompt_token_ids) - num_scored
    for place in range(max(first, 1), len(output.prompt_token_ids)):
        table = output.prompt_logprobs[place]
        assert table is not None
        entry = table[output.prompt_token_ids[place]]
        total += entry.logprob
        greedy = greedy and entry.rank == 1
    return total, greedy


def main() -> None:
    """Run lm-eval's command line, which knows the model `spectral-paged` now."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    main()
