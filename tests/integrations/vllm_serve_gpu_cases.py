"""`vllm serve` with pages answers the official client: many streams at once, from real sockets.

Run by name on a machine with vLLM, openai and a CUDA device:
`pytest tests/integrations/vllm_serve_gpu_cases.py`. The model has two layers of the 8B shape and
random weights; its words mean nothing, their number does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path
from socket import socket

import pytest

from support.small_world import VOCAB, tokenizer

pytestmark = pytest.mark.gpu

STREAMS, NUM_TOKENS, NAME = 64, 80, "little"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCAB,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def free_port():
    with closing(socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


@contextmanager
def serving(folder, log):
    """A started `vllm serve` with the arguments that `spectral-paged vllm-args` prints; its url."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer().save_pretrained(folder)
    named = ["vllm-args", str(folder), "--kv-format", "spectral-quality"]
    cli = "from spectral_paged.cli.commands import main; raise SystemExit(main())"
    given = subprocess.run(
        [sys.executable, "-c", cli, *named], check=True, capture_output=True, text=True
    ).stdout.split()
    url = f"http://127.0.0.1:{free_port()}"
    options = {
        "--port": url.rpartition(":")[2],
        "--load-format": "dummy",
        "--max-model-len": "8192",
        "--kv-cache-memory-bytes": str(2 << 30),
        "--gpu-memory-utilization": "0.1",
        "--served-model-name": NAME,
    }
    line = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *given]
    line += [word for pair in options.items() for word in pair]
    with (
        log.open("w") as file,
        subprocess.Popen(line, stdout=file, stderr=file, start_new_session=True) as server,
    ):
        try:
            begin = time.monotonic()
            while True:
                try:
                    get(f"{url}/health")
                    break
                except OSError:
                    ended = server.poll() is not None
                    if ended or time.monotonic() - begin > 240:
                        pytest.fail(log.read_text()[-6000:])
                    time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(60)


async def streams(url, prompts):
    """Ask for all completions at once; a completion's usage, chunks and reason to end, each."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=200)

    async def one(prompt):
        chunks, reason, usage = 0, None, None
        stream = await client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                chunks += 1  # some without text: bytes that are no character yet
                reason = choice.finish_reason or reason
        return usage, chunks, reason

    async with client:
        return await asyncio.gather(*map(one, prompts))


def gauge(url, name):
    found = re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", get(f"{url}/metrics"), re.MULTILINE)
    assert found, f"no metric vllm:{name}"
    return sum(map(float, found))


def test_streams_of_the_official_client_all_end_whole(tmp_path):
    rng = random.Random(0)
    lengths = [40 + 3100 * (i % 4 == 3) + 7 * i for i in range(STREAMS)]  # every fourth seals
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    log = Path(os.environ.get("OUT", tmp_path)) / "vllm-serve.log"
    with serving(tmp_path, log) as url:
        begin = time.monotonic()
        found = asyncio.run(streams(url, prompts))
        seconds = time.monotonic() - begin
        for (usage, chunks, reason), length in zip(found, lengths, strict=True):
            assert usage.prompt_tokens == length and usage.completion_tokens == NUM_TOKENS
            assert chunks > 1 and reason == "length"
        again = asyncio.run(streams(url, prompts[:8]))
        assert [usage.completion_tokens for usage, _, _ in again] == [NUM_TOKENS] * 8
        assert gauge(url, "prefix_cache_hits_total") > 0
        deadline = time.monotonic() + 10
        while gauge(url, "num_requests_running") or gauge(url, "kv_cache_usage_perc"):
            assert time.monotonic() < deadline, "requests hold pages after their end"
            time.sleep(0.2)
    if where := os.environ.get("OUT"):
        with open(f"{where}/vllm-serve.json", "w") as file:
            json.dump({"streams": STREAMS, "tokens": NUM_TOKENS, "seconds": seconds}, file)
