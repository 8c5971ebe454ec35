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
        "--all2all-backend": "allgather_reducescatter",
        "--cp-kv-cache-interleave-size": "1",
        "--cpu-distributed-timeout-seconds": "",
        "--data-parallel-external-lb": "off",
        "--data-parallel-hybrid-lb": "off",
        "--data-parallel-multi-port-external-lb": "off",
        "--data-parallel-supervisor-port": "9256",
        "--dbo-decode-token-threshold": "",
        "--dbo-prefill-token-threshold": "",
        "--dcp-comm-backend": "ag_rs",
        "--dcp-kv-cache-interleave-size": "1",
        "--device-ids": "",
        "--disable-nccl-for-dp-synchronization": "off",
        "--distributed-timeout-seconds": "",
        "--dp-supervisor-probe-failure-threshold": "3",
        "--dp-supervisor-probe-interval-s": "5.0",
        "--dp-supervisor-probe-timeout-s": "5.0",
        "--enable-dbo": "off",
        "--enable-elastic-ep": "off",
        "--enable-ep-weight-filter": "off",
        "--eplb-config": "",
        "--expert-placement-strategy": "linear",
        "--max-parallel-loading-workers": "",
        "--numa-bind": "off",
        "--numa-bind-cpus": "",
        "--numa-bind-nodes": "",
        "--ray-workers-use-nsight": "off",
        "--renderer-num-workers": "1",
        "--ubatch-size": "",
        "--worker-extension-cls": "",
    },
    "name the model as the first argument": {"--model": ""},
    "name the format of pages by --kv-format: `exact`, or a preset": {
        "--kv-cache-dtype": "auto",
        "--calculate-kv-scales": "off",
    },
    "a page has 512 tokens and an exact page 64; --kv-cache-bytes says how much memory they get": {
        "--block-size": "",
        "--num-gpu-blocks-override": "",
        "--disable-hybrid-kv-cache-manager": "off",
        "--enable-mamba-cache-stochastic-rounding": "off",
        "--mamba-backend": "",
        "--mamba-block-size": "",
        "--mamba-cache-dtype": "auto",
        "--mamba-cache-mode": "none",
        "--mamba-cache-philox-rounds": "0",
        "--mamba-ssm-cache-dtype": "auto",
        "--prefix-caching-hash-algo": "sha256",
        "--prefix-match-unit": "",
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
        "--cpu-offload-params": "",
        "--ec-transfer-config": "",
        "--kv-sharing-fast-prefill": "off",
        "--offload-backend": "auto",
        "--offload-group-size": "",
        "--offload-num-in-group": "",
        "--offload-params": "",
        "--offload-prefetch-step": "",
    },
    "--quantization names the method, and there is nothing else to choose": {
        "--quantization-config": "",
        "--allow-deprecated-quantization": "off",
    },
    "adapters lie on the device in the model's dtype, --max-loras of them at a time": {
        "--max-cpu-loras": "",
        "--lora-dtype": "auto",
        "--fully-sharded-loras": "off",
        "--default-mm-loras": "",
        "--enable-mixed-moe-lora-format": "off",
        "--enable-moe-shared-loras": "off",
        "--enable-tower-connector-lora": "off",
        "--lora-target-modules": "",
        "--specialize-active-lora": "off",
    },
    "no draft model is run: give --speculative-config with the method `ngram`": {
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
        "--exclude-tools-when-tool-choice-none": "off",
    },
    "reasoning is not parsed: read it from the text of the answer": {
        "--reasoning-parser": "",
        "--reasoning-config": "",
        "--reasoning-parser-plugin": "",
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
        "--allowed-media-domains": "",
        "--diffusion-config": "",
        "--disable-chunked-mm-input": "off",
        "--enable-flash-late-interaction": "on",
        "--enable-mm-embeds": "off",
        "--interleave-mm-strings": "off",
        "--io-processor-plugin": "",
        "--mm-encoder-attn-backend": "",
        "--mm-encoder-attn-dtype": "",
        "--mm-encoder-fp8-scale-path": "",
        "--mm-encoder-fp8-scale-save-margin": "",
        "--mm-encoder-fp8-scale-save-path": "",
        "--mm-encoder-only": "off",
        "--mm-encoder-tp-mode": "weights",
        "--mm-ipc-gpu-memory-gb": "",
        "--mm-processor-cache-gb": "",
        "--mm-processor-cache-type": "lru",
        "--mm-shm-cache-max-object-size-mb": "",
        "--mm-tensor-ipc": "direct_rpc",
        "--skip-mm-profiling": "off",
        "--video-pruning-rate": "",
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
        "--ignore-patterns": "",
        "--model-class-overrides": "",
        "--model-loader-extra-config": "",
        "--pt-load-map-location": "cpu",
        "--safetensors-load-strategy": "",
        "--safetensors-prefetch-block-size": "",
        "--safetensors-prefetch-num-threads": "",
        "--use-tqdm-on-load": "on",
        "--weight-transfer-config": "",
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
        "--max-num-scheduled-tokens": "",
        "--performance-mode": "balanced",
        "--prefill-schedule-interval": "",
        "--scheduler-reserve-full-isl": "on",
        "--watermark": "",
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
        "--additional-config": "",
        "--enable-bf16x3-router-gemm": "off",
        "--enable-cumem-allocator": "off",
        "--enable-flashinfer-autotune": "off",
        "--gdn-prefill-backend": "",
        "--ir-op-priority": "",
        "--jit-monitor-mode": "warn",
        "--jit-monitor-verbose": "off",
        "--kernel-config": "",
        "--linear-backend": "auto",
        "--max-cudagraph-capture-size": "",
        "--moe-backend": "auto",
        "--override-attention-dtype": "",
        "--use-fp64-gumbel": "off",
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
        "--disable-fastapi-docs": "off",
        "--enable-offline-docs": "off",
        "--enable-ssl-refresh": "off",
        "--fingerprint-mode": "full",
        "--fingerprint-value": "",
        "--grpc": "off",
        "--h11-max-header-count": "",
        "--h11-max-incomplete-event-size": "",
        "--ssl-cert-reqs": "",
        "--ssl-ciphers": "",
    },
    "neither prompts nor answers are logged; --log-level warning leaves out the line of each "
    "answer, and --log-format json writes objects": {
        "--enable-log-requests": "off",
        "--disable-log-requests": "on",
        "--enable-log-outputs": "off",
        "--max-log-len": "",
        "--log-config-file": "",
        "--uvicorn-log-level": "info",
        "--disable-uvicorn-access-log": "off",
        "--disable-access-log-for-endpoints": "",
        "--otlp-traces-endpoint": "",
        "--aggregate-engine-logging": "off",
        "--collect-detailed-traces": "",
        "--cudagraph-metrics": "off",
        "--enable-layerwise-nvtx-tracing": "off",
        "--enable-log-deltas": "on",
        "--enable-logging-iteration-details": "off",
        "--enable-mfu-metrics": "off",
        "--enable-per-request-metrics": "off",
        "--enable-server-load-tracking": "off",
        "--kv-cache-metrics": "off",
        "--kv-cache-metrics-sample": "",
        "--log-error-stack": "off",
        "--profiler-config": "",
        "--show-hidden-metrics-for-version": "",
    },
    "an answer has what its request asks for: log-probabilities of raw logits, and usage by "
    "stream_options": {
        "--logprobs-mode": "raw_logprobs",
        "--return-tokens-as-token-ids": "off",
        "--enable-prompt-tokens-details": "on",
        "--enable-force-include-usage": "off",
        "--enable-return-routed-experts": "off",
        "--enable-tokenizer-info-endpoint": "off",
        "--tokens-only": "off",
    },
    "write the options on the command line": {
        "--config": "",
        "--fail-on-environ-validation": "off",
    },
}
# Flags of vLLM's that ask for nothing, on or off -> why
TAKEN: dict[str, str] = {
    "--disable-log-stats": "figures are counted always",
    "--enable-sleep-mode": "every LLM can sleep",
}
# What to do instead -> methods of vLLM's `LLM` that are not here
METHODS_NOT_SERVED: dict[str, tuple[str, ...]] = {
    "models that generate": ("embed", "encode", "classify", "score", "reward", "reset_mm_cache"),
    "the model that `LLM.from_model` was given": (
        "apply_model",
        "collective_rpc",
        "init_weight_transfer_engine",
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
        "finish_weight_update",
    ),
    "`LLM(args.model, cache_options=args.options)`": ("from_engine_args",),
    "`llm.chat`": ("enqueue_chat",),
    "1, because there is one process": ("get_world_size",),
    "`llm.engine`": ("llm_engine",),
    "`LLM.from_model(model, tokenizer)`": ("set_tokenizer",),
    "`spectral-paged bench`": ("start_profile", "stop_profile"),
}


def instead_of_method(name: str) -> str:
    """Return what to do instead of a method of vLLM's `LLM`, as a part of a sentence, if any."""
    found = [instead for instead, names in METHODS_NOT_SERVED.items() if name in names]
    return f": take {found[0]}" if found else ""


def instead_of(name: str, value: Any) -> str | None:
    """Return why an argument of vLLM's is refused, or "" if it asks for nothing.

    None: vLLM has no such argument either, as far as this package knows.

    Args:
        name: as in a call, `tensor_parallel_size`.
    """
    option = f"--{name.replace('_', '-')}"
    if option in TAKEN:
        return ""
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
