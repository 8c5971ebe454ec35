"""lm-eval's likelihood and generation tasks run on local files, by HTTP and over an `LLM`."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from spectral_paged import LLM
from spectral_paged.integrations.lm_eval import SpectralPagedLM
from support.real_text import text as real_text
from support.served import letter_tokenizer, served_llm
from support.tiny_model import tiny_model

MODEL = "smollm2"
CHOICES = [
    {"question": "The capital of France is", "choices": [" Paris", " a spoon"], "answer": 0},
    {"question": "Two plus two is", "choices": [" banana", " four"], "answer": 1},
    {"question": "The sun rises in the", "choices": [" east", " bottle"], "answer": 0},
]
TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8}
metric_list: [{metric: exact_match, ignore_case: true}]
""",
}
NAMES = list(TASKS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks of lm-eval over local files."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = dict.fromkeys(NAMES, CHOICES) | {
        "own_rolling": [{"text": real_text("sherlock_holmes")[:3000]}]
    }
    for name, body in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs[name]))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + body)
    return folder


def results(model, tasks, names=NAMES, **options):
    found = lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=TaskManager(include_path=str(tasks)), **options
    )
    return found["results"]


def test_tasks_say_the_same_by_http_and_over_an_llm(llm, url, tokenizer_folder, tasks):
    here = results(SpectralPagedLM(llm), tasks)
    args = f"model={MODEL},base_url={url}/completions,tokenizer={tokenizer_folder}"
    args += ",num_concurrent=2,max_length=2048,max_gen_toks=8"
    there = results("local-completions", tasks, model_args=args)
    assert here["own_choice"]["acc,none"] == 1.0
    for name in NAMES:
        for metric, value in here[name].items():
            if isinstance(value, float) and not metric.startswith("alias"):
                assert there[name][metric] == pytest.approx(value, rel=2e-2), (name, metric)
    assert 3 < here["own_rolling"]["word_perplexity,none"] < 300


def exact_llm(**options):
    return LLM.from_model(
        tiny_model(), letter_tokenizer(), kv_format="exact", kv_cache_bytes=16 << 20, **options
    )


def letters(size):
    return "".join(chr(33 + i * 7 % 90) for i in range(size))


def asked(*args):
    return [Instance("loglikelihood", {}, one, i) for i, one in enumerate(args)]


@pytest.mark.parametrize("size", [1, 40, 700, 1500])
def test_likelihoods_of_exact_pages_are_the_models(size):
    lm = SpectralPagedLM(exact_llm())
    context, target = letters(size), "tell"
    ids = lm.tok_encode(context + target)
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows = range(size - 1, size + 3)
    want = sum(float(logits[row, ids[row + 1]]) for row in rows)
    greedy = all(int(logits[row].argmax()) == ids[row + 1] for row in rows)
    ((found, is_greedy),) = lm.loglikelihood(asked((context, target)), disable_tqdm=True)
    assert found == pytest.approx(want, abs=1e-3) and is_greedy == greedy


def test_the_most_probable_continuation_is_told():
    lm = SpectralPagedLM(exact_llm())
    (text,) = lm.generate_until(
        [Instance("generate_until", {}, ("tell me", {"until": ["\n"], "max_gen_toks": 4}), 0)],
        disable_tqdm=True,
    )
    assert len(text) == 4
    pairs = [("tell me", text), ("tell me", text[::-1] + "x")]
    (best, greedy), (_, other) = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    assert greedy and not other and best < 0


def test_a_text_is_cut_into_windows_and_each_token_counts_once():
    lm = SpectralPagedLM(exact_llm(max_model_len=256))
    lm.tokenizer.add_special_tokens({"eos_token": "~"})
    text = letters(700)
    (found,) = lm.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    assert -700 * 10 < found < -700 * 2


def test_likelihoods_read_pages_and_texts_that_read_none_are_told(caplog):
    lm = SpectralPagedLM(served_llm())  # segments of 512 tokens
    exact = SpectralPagedLM(exact_llm())
    for size, told in ((300, True), (1900, False)):
        pair = (letters(size), letters(40))
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            ((found, _),) = lm.loglikelihood(asked(pair), disable_tqdm=True)
        assert ("reads a page" in caplog.text) == told
        ((want, _),) = exact.loglikelihood(asked(pair), disable_tqdm=True)
        assert found == pytest.approx(want, rel=0.02)
        assert (found == pytest.approx(want, abs=1e-4)) == told


def test_the_command_line_knows_the_model(tasks):
    words = ["--model", "spectral-paged", "--tasks", "own_choice", "--include_path", str(tasks)]
    words += ["--model_args", "pretrained=smollm2-135m,kv_format=exact,kv_cache_bytes=268435456"]
    done = subprocess.run(
        [sys.executable, "-m", "spectral_paged.integrations.lm_eval", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "own_choice" in done.stdout and "acc" in done.stdout
