"""Engines of vLLM, each in a process of its own, over models of random weights.

Their weights are loud enough that attention decides the next token. bf16 sums depend on the size
of a batch, so tokens may part where two logits are nearly equal (`agree`); a wrong kernel or a
stale page parts them at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

LENGTHS = (40, 700, 1500, 3000, 5000)
NUM_TOKENS = 96
CLOSE = 0.1  # of a log-prob: a step of a logit of 4 to 8 in bf16 is 0.03

START = r"""
import json, os, pathlib, sys, tempfile
os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
import numpy as np
import torch
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from spectral_paged.benchmarks.throughput.vllm_server import byte_tokenizer
from spectral_paged.integrations.vllm import engine_args

given = json.loads(sys.argv[1])
own, gigabytes = given.pop("own", False), given.pop("gigabytes", 4)
folder = pathlib.Path(tempfile.mkdtemp())
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False} | given.pop("config", {})
(folder / "config.json").write_text(json.dumps(config))
byte_tokenizer(folder)  # a calibration reads text
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.add_special_tokens({"eos_token": "</s>"})  # a grammar ends with it
tokenizer.save_pretrained(folder)
options = {} if own else engine_args(max_num_seqs=16, **{"kv_format": given.pop("kv_format")})
options |= given
options.setdefault("max_num_seqs", 16)
llm = LLM(model=str(folder), load_format="dummy", dtype="bfloat16",
          max_model_len=8192, kv_cache_memory_bytes=int(gigabytes * 2**30), seed=0,
          gpu_memory_utilization=0.1, generation_config="vllm", disable_log_stats=False, **options)

def louder(model):
    generator = torch.Generator(device="cuda").manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):  # made up ones are near zero: all tokens alike
                weight.fill_(1.0)
            elif weight.dim() == 2 and min(weight.shape) > 1:
                noise = torch.randn(weight.shape, generator=generator, device=weight.device) * 0.02
                owner = model.get_submodule(name.rpartition(".")[0])
                scale = getattr(owner, "weight_scale", None)  # of weights in FP8
                if scale is not None:
                    scale.fill_(0.1 / 448)
                    noise = (noise / (0.1 / 448)).clamp(-448, 448)
                weight.copy_(noise)

llm.apply_model(louder)
rng = np.random.default_rng(0)
largest = min(config["vocab_size"], 100000)

def made_up(length):
    return {"prompt_token_ids": rng.integers(300, largest, length).tolist()}

prompts = [made_up(n) for n in LENGTHS]

def run(some, num_tokens=NUM_TOKENS, **options):
    found = []
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True,
                            detokenize=False, logprobs=1)
    for output in llm.generate(some, params, use_tqdm=False, **options):
        one = output.outputs[0]
        logprobs = [next(iter(entry.values())).logprob for entry in one.logprobs]
        found.append({"tokens": list(one.token_ids), "logprobs": logprobs,
                      "cached": output.num_cached_tokens, "reason": one.finish_reason})
    return found

def stats():
    return {} if own else llm.collective_rpc("page_stats")[0]

"""
RUN = r"""
import traceback
result = {}
try:
    exec(BODY)
except Exception:
    result["failed"] = traceback.format_exc()[-3000:]
print("RESULT " + json.dumps(result, default=str))
"""


def run_engine(options, body):
    """Start an engine with these options and run the code of `body`, which fills `result`.

    Returns what `result` had at the end, or when `body` raised, or the log of a failed start.
    """
    start = START.replace("LENGTHS", repr(LENGTHS)).replace("NUM_TOKENS", repr(NUM_TOKENS))
    done = subprocess.run(
        [sys.executable, "-c", start + RUN.replace("BODY", repr(body)), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[0][7:]) if lines else done.stderr[-4000:]


def run_engines(engines, body, name):
    """All engines at once, by name; also as `name`.json in the folder that `OUT` names."""
    with ThreadPoolExecutor(len(engines)) as pool:
        results = dict(zip(engines, pool.map(run_engine, engines.values(), repeat(body))))
    if where := os.environ.get("OUT"):
        with open(f"{where}/{name}.json", "w") as file:
            json.dump(results, file)
    return results


def of(found, name):
    """The result of one engine; fails with the end of its log where it is not whole."""
    assert isinstance(found[name], dict), found[name]
    assert "failed" not in found[name], found[name]["failed"]
    return found[name]


def agree(one, other, close=CLOSE):
    """Equal log-probs, within steps of bf16, up to the first token where one of two near ties won.

    As close as FLASH_ATTN is to itself in a batch of another size; formats that round K and V are
    four times as far from `exact`.
    """
    compared = 0
    for a, b in zip(one, other, strict=True):
        pairs = list(zip(a["tokens"], b["tokens"], strict=True))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs) - 1)
        apart = [abs(x - y) for x, y in zip(a["logprobs"][: same + 1], b["logprobs"], strict=False)]
        assert max(apart) < close, apart
        compared += len(apart)
    assert compared >= NUM_TOKENS // 4, compared
