"""Options of vLLM that are not served here, what to do instead, and values that ask for nothing.

A value that asks for nothing, as `tensor_parallel_size=1` does, is taken, so that a call or a line
written for vLLM runs where it asks for nothing else. Options that are served have vLLM's names as
further names.
"""

from __future__ import annotations

from typing import Any

from spectral_paged.errors import shown

PAGE = "docs/vllm-comparison.md"
# What to do instead -> names of an option -> its values that ask for nothing. `on` and `off` are
# those of a flag: `off` refuses `--name` and takes `--no-name`.
NOT_SERVED: dict[str, dict[str, str]] = {
    "one process serves one model on one device: start more servers behind a proxy, or use "
    "`generate --ray` for files": {
        "--tensor-parallel-size -tp": "1",
        "--pipeline-parallel-size -pp": "1",
        "--data-parallel-size -dp": "1",
        "--data-parallel-size-local -dpl": "1",
        "--data-parallel-rank -dpn": "0",
        "--data-parallel-start-rank -dpr": "0",
        "--data-parallel-address -dpa": "",
        "--data-parallel-rpc-port -dpp": "",
        "--data-parallel-backend -dpb": "mp",
        "--decode-context-parallel-size -dcp": "1",
        "--prefill-context-parallel-size -pcp": "1",
        "--enable-expert-parallel -ep": "off",
        "--enable-eplb": "off",
        "--distributed-executor-backend": "uni mp",
        "--disable-custom-all-reduce": "on",
        "--nnodes -n": "1",
        "--node-rank -r": "0",
        "--master-addr": "127.0.0.1",
        "--master-port": "",
        "--headless": "off",
        "--api-server-count -asc": "1",
        "--worker-cls": "auto",
    },
    "name the model as the first argument": {"--model": ""},
    "name the format of pages by --kv-format: `exact`, or a preset": {
        "--kv-cache-dtype": "auto",
        "--calculate-kv-scales": "off",
    },
    "a page has 512 tokens and an exact page 64; --kv-cache-bytes says how much memory they get": {
        "--block-size": "",
        "--num-gpu-blocks-override": "",
    },
    "name the host memory for prefixes in bytes by --kv-host-memory": {
        "--swap-space": "0",
        "--kv-offloading-size": "0",
        "--kv-offloading-backend": "native",
    },
    "weights stay on the device, and pages go to --kv-host-memory and --kv-store": {
        "--cpu-offload-gb": "0",
        "--kv-transfer-config": "",
        "--kv-events-config": "",
    },
    "--quantization names the method, and there is nothing else to choose": {
        "--quantization-config": "",
    },
    "adapters lie on the device in the model's dtype, --max-loras of them at a time": {
        "--max-cpu-loras": "",
        "--lora-dtype": "auto",
        "--fully-sharded-loras": "off",
    },
    "no draft model is run: leave it out": {
        "--speculative-config -sc": "",
        "--speculative-model": "",
        "--num-speculative-tokens": "0",
        "--spec-method": "",
        "--spec-model": "",
        "--spec-tokens": "0",
    },
    "tools are parsed wherever a body has them, by --tool-call-parser hermes, llama3_json or "
    "mistral": {
        "--enable-auto-tool-choice": "on",
        "--tool-parser-plugin": "",
        "--tool-server": "",
    },
    "reasoning is not parsed: read it from the text of the answer": {
        "--reasoning-parser": "",
    },
    "llguidance constrains answers, and no code comes with a command line: leave it out": {
        "--structured-outputs-config": "",
        "--guided-decoding-backend": "auto guidance",
        "--logits-processors": "",
    },
    "models of text alone are served, and they generate": {
        "--limit-mm-per-prompt": "{}",
        "--mm-processor-kwargs": "{}",
        "--media-io-kwargs": "{}",
        "--allowed-local-media-path": "",
        "--language-model-only": "on",
        "--task": "auto generate",
        "--runner": "auto generate",
        "--convert": "auto none",
        "--pooler-config": "",
        "--enable-prompt-embeds": "off",
    },
    "the model's own files decide: put other ones into its folder": {
        "--tokenizer": "",
        "--tokenizer-mode": "auto hf",
        "--skip-tokenizer-init": "off",
        "--chat-template": "",
        "--chat-template-content-format": "auto string",
        "--default-chat-template-kwargs": "{}",
        "--trust-request-chat-template": "off",
        "--response-role": "assistant",
        "--hf-overrides": "{}",
        "--hf-config-path": "",
        "--rope-scaling": "",
        "--rope-theta": "",
        "--override-generation-config": "{}",
        "--config-format": "auto hf",
        "--load-format": "auto safetensors gguf",
        "--model-impl": "auto transformers",
    },
    "fetch it first (`hf download MODEL --revision REVISION --local-dir FOLDER`; a token stands in "
    "$HF_TOKEN, the folder of downloads in $HF_HOME) and name the folder": {
        "--revision": "main",
        "--code-revision": "",
        "--tokenizer-revision": "main",
        "--download-dir": "",
        "--hf-token": "",
    },
    "requests run in the order in which they come, and a step takes what its budgets allow "
    "(--max-num-batched-tokens, --max-num-seqs)": {
        "--scheduling-policy": "fcfs",
        "--scheduler-cls": "",
        "--enable-chunked-prefill": "on",
        "--max-num-partial-prefills": "1",
        "--max-long-partial-prefills": "1",
        "--long-prefill-token-threshold": "0",
        "--num-scheduler-steps": "1",
        "--stream-interval": "1",
    },
    "kernels and graphs are chosen by layout and GPU: --enforce-eager and --no-compile-layers are "
    "what there is to choose": {
        "--attention-backend": "",
        "--attention-config": "",
        "--compilation-config -cc": "",
        "--optimization-level": "",
        "--max-seq-len-to-capture": "",
        "--cudagraph-capture-sizes": "",
        "--disable-sliding-window": "off",
        "--disable-cascade-attn": "on",
    },
    "put a proxy in front, which has TLS, headers and paths of its own": {
        "--ssl-keyfile": "",
        "--ssl-certfile": "",
        "--ssl-ca-certs": "",
        "--uds": "",
        "--root-path": "",
        "--middleware": "",
        "--allow-credentials": "off",
        "--allowed-methods": '["*"]',
        "--allowed-headers": '["*"]',
        "--enable-request-id-headers": "off",
    },
    "neither prompts nor answers are logged; --log-level warning leaves out the line of each "
    "answer, and --log-format json writes objects": {
        "--enable-log-requests": "off",
        "--disable-log-requests": "on",
        "--enable-log-outputs": "off",
        "--disable-log-stats": "on",
        "--max-log-len": "",
        "--log-config-file": "",
        "--uvicorn-log-level": "info",
        "--disable-uvicorn-access-log": "off",
        "--disable-access-log-for-endpoints": "",
        "--otlp-traces-endpoint": "",
    },
    "an answer has what its request asks for: log-probabilities of raw logits, and usage by "
    "stream_options": {
        "--logprobs-mode": "raw_logprobs",
        "--return-tokens-as-token-ids": "off",
        "--enable-prompt-tokens-details": "on",
        "--enable-force-include-usage": "off",
    },
    "write the options on the command line": {"--config": ""},
    "stop the server, and start it again": {"--enable-sleep-mode": "off"},
}


def instead_of(name: str, value: Any) -> str | None:
    """Return why an argument of vLLM's is refused, or "" if it asks for nothing.

    None: vLLM has no such argument either, as far as this package knows.

    Args:
        name: as in a call, `tensor_parallel_size`.
    """
    option = f"--{name.replace('_', '-')}"
    for instead, options in NOT_SERVED.items():
        for names, neutral in options.items():
            if option in names.split():
                if value is None or _spelled(value) in neutral.split():
                    return ""
                return f"{name}={shown(value)} of vLLM is not served: {instead} ({PAGE})"
    return None


def _spelled(value: Any) -> str:
    """Return a value as it stands on a command line."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
