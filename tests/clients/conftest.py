"""A server over the embedded model, for clients that the suite's own environment does not have."""

from __future__ import annotations

import os

import pytest

from spectral_paged import LLM
from support.served import serving

MODEL = "smollm2"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}. A call is written as "
    '<tool_call>{"name": "...", "arguments": {}}</tool_call>.<|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


@pytest.fixture(scope="session")
def llm():
    made = LLM(kv_format="spectral-int8", kv_cache_bytes=256 << 20, max_model_len=2048)
    made.get_tokenizer().chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def served(llm):
    with serving(llm, model_names=(MODEL,)) as running:
        os.environ["OPENAI_API_KEY"] = "none"
        yield running
        running.settle()


@pytest.fixture(scope="session")
def url(served):
    return f"{served.url}/v1"


@pytest.fixture(scope="session")
def tokenizer_folder(llm, tmp_path_factory):
    """A folder with the model's tokenizer, for clients that count tokens themselves."""
    folder = tmp_path_factory.mktemp("tokenizer")
    llm.get_tokenizer().save_pretrained(folder)
    return folder
