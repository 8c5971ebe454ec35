"""A server on loopback over the tiny model, with a tokenizer of one token a character."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager

import openai
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from spectral_paged import LLM
from spectral_paged.server.app import Service
from spectral_paged.server.command import bound
from spectral_paged.server.http_server import HttpServer
from spectral_paged.server.settings import ServerSettings
from support.tiny_model import VOCAB, tiny_format, tiny_model

LETTERS = [chr(c) for c in (*range(32, 127), *range(0xC0, 0x17F))][:VOCAB]
VALUES = {"model": "tiny", "temperature": 0}  # fields of a request
LONG = "".join(chr(33 + i * 7 % 90) for i in range(720))  # a prompt with a page
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a conversation begins with the user') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


def letter_tokenizer():
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)


def served_llm(**options):
    defaults = {"kv_cache_bytes": 16 << 20, "max_num_seqs": 16, "debug_poison": True}
    return LLM.from_model(
        tiny_model(), letter_tokenizer(), kv_format=tiny_format(), **(defaults | options)
    )


def templated_llm(template):
    """A model whose tokenizer has another chat template."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    return LLM.from_model(
        tiny_model(), tokenizer, kv_format=tiny_format(), kv_cache_bytes=16 << 20, max_num_seqs=8
    )


class Served:
    """A running server. `url` ends with the port."""

    def __init__(self, service, server, url):
        self.service, self.server, self.url = service, server, url

    def client(self, **options):
        options = {"api_key": "any", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def async_client(self, **options):
        options = {"api_key": "any", "max_retries": 0, "timeout": 120} | options
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **options)

    def settle(self, seconds=30):
        """Wait until no request is in work, then check that no sequence or body is left."""
        deadline = time.monotonic() + seconds
        engine = self.service.llm.engine
        answering = self.server.server_state.tasks  # what is logged and counted comes last
        while self.service.concurrency.taken or engine.has_unfinished() or answering:
            assert time.monotonic() < deadline, "requests are left behind"
            time.sleep(0.01)
        stats = self.service.llm.stats()
        assert not self.service.engine._generations and not self.service.bodies.taken
        self.service.llm.cache.check_integrity()
        assert stats["running"] == stats["waiting"] == stats["num_sequences"] == 0


@contextmanager
def serving(llm, **settings):
    service = Service(llm, ServerSettings(**({"model_names": ("tiny", "alias")} | settings)))
    ready = threading.Event()
    server = HttpServer(service, ready.set)
    with bound("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            assert ready.wait(30)
            yield Served(service, server, url)
        finally:
            server.should_exit = True
            thread.join()


def wait_until(true, seconds=30):
    """Wait until `true()`, for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def flaky(llm, monkeypatch, errors):
    """Make the first forwards raise `errors`, the last of the list first."""
    forward = llm.engine.runner.forward

    def raising(*args, **kwargs):
        if errors:
            raise errors.pop()
        return forward(*args, **kwargs)

    monkeypatch.setattr(llm.engine.runner, "forward", raising)
