"""Load generators measure the server: guidellm, and vLLM's `bench serve` where it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = "smollm2"
VLLM = Path(os.environ.get("VLLM_PACKAGES", "build/vllm"))  # as `make vllm` installs it
# what `vllm bench serve` runs; the command itself loads engines, which need what a GPU's vLLM has
BENCH_SERVE = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main\n"
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def run(words, **environ):
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environ,
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])


def test_guidellm_measures(served, tokenizer_folder, tmp_path):
    out = tmp_path / "report.json"
    words = ["-m", "guidellm", "run", "--profile", "kind=synchronous"]
    words += ["--backend", f"kind=openai_http,target={served.url},model={MODEL}"]
    words += ["--tokenizer", f"kind=hf_auto,model={tokenizer_folder}"]
    words += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"]
    words += ["--constraint", "kind=max_requests,count=4", "--output", f"kind=json,path={out}"]
    run([*words, "--disable-console-interactive"])
    (report,) = json.loads(out.read_text())["benchmarks"]
    totals = report["metrics"]["request_totals"]
    # guidellm counts to four requests that it sent, and may cancel the last of them
    assert totals["errored"] == 0 and totals["successful"] >= 3
    assert totals["successful"] + totals["incomplete"] == 4


@pytest.mark.skipif(not (VLLM / "vllm").exists(), reason="`make vllm` fetches vLLM")
def test_vllms_bench_serve_measures(served, tokenizer_folder, tmp_path):
    words = ["--backend", "openai", "--base-url", served.url, "--model", MODEL]
    words += ["--tokenizer", str(tokenizer_folder), "--dataset-name", "random"]
    words += ["--random-input-len", "32", "--random-output-len", "8", "--num-prompts", "4"]
    words += ["--save-result", "--result-dir", str(tmp_path)]
    path = os.pathsep.join([str(VLLM.resolve()), os.environ.get("PYTHONPATH", "")])
    run(["-c", BENCH_SERVE, *words], PYTHONPATH=path)
    (report,) = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert (report["completed"], report["failed"]) == (4, 0)
    assert report["total_output_tokens"] == 32
