"""The server answers as its OpenAPI description says, whatever is sent."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from pydantic import TypeAdapter

from spectral_paged.openai import ErrorResponse, parse_body
from spectral_paged.server.app import Service
from spectral_paged.server.response import OpenAIResponse
from support.effort import examples
from support.paths import ROOT
from support.served import served_llm, serving


@pytest.fixture(scope="module")
def served():
    llm = served_llm(kv_cache_bytes=2 << 20, max_num_seqs=8, max_model_len=512)
    with serving(llm, max_num_requests=64, max_tokens=8, max_body_bytes=100_000) as running:
        yield running
        running.settle()


def schemathesis(url, folder, *options):
    """Exit code and output of a run over the description, which sends the same each time."""
    run = ["--config-file", ROOT / "schemathesis.toml", "run", f"{url}/openapi.json"]
    same = ["--seed", "1", "--generation-database", "none", "--no-color"]
    command = [sys.executable, "-m", "schemathesis.cli", *run, *same, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_no_request_is_answered_otherwise_than_described(served, tmp_path):
    """Right and wrong data, other methods and types: no 500, and no undescribed answer."""
    code, output = schemathesis(served.url, tmp_path, "--max-examples", str(examples(10, 100)))
    assert code == 0, output
    assert "Selected: 10/10" in output and "Tested: 10" in output


def card_of_more(self, name):
    return {"id": name, "object": "model", "created": 0, "owned_by": "x", "max_model_len": 1.5}


def delta_of_more(self, index, delta, finish_reason=None):
    return {"index": index, "delta": delta, "finish_reason": finish_reason}


def body_without_what_is_unknown(body, **options):
    if isinstance(body, dict):
        body = {name: body[name] for name in ("prompt", "max_tokens", "model") if name in body}
    return parse_body(body, **options)


def failing(*args, **kwargs):
    raise RuntimeError("a defect")


@pytest.mark.parametrize(
    "path, target, name, spoiled, says",
    [
        ("/v1/models", Service, "_card", card_of_more, "Response violates schema"),
        (
            "/v1/chat/completions",
            OpenAIResponse,
            "_delta",
            delta_of_more,
            "violates schema",
        ),
        (
            "/v1/completions",
            "spectral_paged.server.parsing",
            "parse_body",
            body_without_what_is_unknown,
            "Schema-violating request accepted",
        ),
        ("/health", Service, "_health", failing, "Server error"),
    ],
    ids=["an answer", "an event of a stream", "a body", "a fault"],
)
def test_another_answer_than_described_is_found(
    served, tmp_path, monkeypatch, path, target, name, spoiled, says
):
    if isinstance(target, str):
        monkeypatch.setattr(f"{target}.{name}", spoiled)
    else:
        monkeypatch.setattr(target, name, spoiled)
    with serving(served_llm(), max_tokens=2) as other:
        options = ("--include-path", path, "--max-examples", "5")
        code, output = schemathesis(other.url, tmp_path, *options)
    assert code == 1 and says in output, output


def test_a_key_is_described_where_it_is_asked_for(tmp_path):
    with serving(served_llm(), api_keys=("secret",)) as locked:
        with urllib.request.urlopen(f"{locked.url}/openapi.json") as answer:
            described = json.load(answer)  # without the key
        key = ("-H", "Authorization: Bearer secret", "--include-path", "/v1/models")
        code, output = schemathesis(locked.url, tmp_path, *key)
    assert code == 0, output
    keyed = {
        path: "security" in operation
        for path, operations in described["paths"].items()
        for operation in operations.values()
    }
    open_to_all = {"/health", "/metrics", "/version"}
    assert keyed == {path: path not in open_to_all for path in keyed} and len(keyed) == 10
    assert not {"secret", "tiny", "alias"} & set(re.findall(r"\w+", json.dumps(described)))


def test_a_description_names_no_status_that_is_never_sent(served):
    with urllib.request.urlopen(f"{served.url}/openapi.json") as answer:
        described = json.load(answer)
    operations = [op for path in described["paths"].values() for op in path.values()]
    assert len({op["operationId"] for op in operations}) == len(operations) == 10
    assert not any("422" in op["responses"] for op in operations)
    assert described["components"]["schemas"]["ModelName"]["enum"] == ["tiny", "alias"]
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        assert described["components"]["schemas"][name]["additionalProperties"] is False


ERRORS = TypeAdapter(ErrorResponse)


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/" + "x" * 30_000, 404, "not_found"),
        ("GET", "/v1/models/" + "x" * 30_000, 404, "model_not_found"),
        ("GET", "/v1/models/%ff%00%E2%80%A8", 404, "model_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("POST", "/openapi.json", 405, "method_not_allowed"),
        ("X" * 30_000, "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/completions", 415, None),
        ("POST", "/v1/chat/completions", 415, None),
        ("GET", "/tokenize", 405, "method_not_allowed"),
        ("POST", "/detokenize", 415, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_every_error_has_openais_form(served, method, path, status, code):
    connection = http.client.HTTPConnection(*served.url.removeprefix("http://").split(":"))
    connection.request(method, path, headers={"Content-Type": "text/" + "x" * 20_000})
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
    error = ERRORS.validate_python(json.loads(answer.read()))["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == code
    assert len(error["message"]) < 1000
    assert ("Allow" in answer.headers) == (status == 405)
    connection.close()


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
)
@pytest.mark.parametrize(
    "body, status",
    [(b"{", 400), (b"[]", 400), (b"{}", 400), (b'{"model": "x", "prompt": 1}', 400)]
    + [(b" " * 100_001, 413), (b'{"model":"x","prompt":"a","messages":[]}', 400)],
    ids=lambda value: str(value)[:30],
)
def test_every_refused_body_is_told_so_in_openais_form(served, path, body, status):
    request = urllib.request.Request(
        served.url + path, body, {"Content-Type": "application/json; charset=utf-8"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == status
    error = ERRORS.validate_python(json.load(caught.value))["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
