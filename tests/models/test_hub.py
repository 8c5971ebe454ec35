"""A name is compared with what is known, and the hub is asked once and not for long."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from spectral_paged import LLM
from spectral_paged.errors import UnknownModelError
from spectral_paged.models import hub, loader
from support.served import letter_tokenizer
from support.tiny_model import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """A hub that has the model `owner/there`, no `owner/broken`, and answers others as absent."""

    asked: list[str] = []

    def do_HEAD(self):
        if self.path != "/api/agent-harnesses":  # what newer clients ask once, of no model
            self.asked.append(self.path)
        owner, name, *_ = self.path.strip("/").split("/")
        if name == "slow":
            time.sleep(1.5)
        status, code = {
            "there": (200, ""),
            "empty": (404, "EntryNotFound"),
            "gated": (403, "GatedRepo"),
            "broken": (503, ""),
        }.get(name, (404, "RepoNotFound"))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The paths that a hub of this test's own was asked for; nothing is kept on the disk."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.chdir(tmp_path)
    yield Hub.asked
    server.shutdown()
    server.server_close()


def point_at(monkeypatch, url):
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@contextmanager
def quick(seconds):
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def keep(tmp_path, name):
    """Put a small model where the hub's client keeps what it has downloaded."""
    repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    folder = repo / "snapshots" / COMMIT
    tiny_model().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return folder


@pytest.mark.parametrize("name", ["smollm2-135", "smolm2-135m", "SmolLM2-135M", "smollm2_135m"])
def test_a_misspelled_alias_is_told_without_asking_anybody(asked, name):
    with quick(1), pytest.raises(UnknownModelError, match="did you mean 'smollm2-135m'"):
        LLM(name)
    assert asked == []


@pytest.mark.parametrize("name", ["./modle", "models/a/lama", "~/none", "/none/at/all"])
def test_a_path_that_is_not_there_is_told_without_asking_anybody(asked, name):
    with quick(1), pytest.raises(UnknownModelError, match="there is no folder"):
        LLM(name)
    assert asked == []


@pytest.mark.parametrize(
    "name, near", [("./lama-tiny", "llama-tiny"), ("models/tiny.guf", "models/tiny.gguf")]
)
def test_what_lies_beside_a_path_is_proposed(asked, tmp_path, name, near):
    (tmp_path / "llama-tiny").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").touch()
    with pytest.raises(UnknownModelError, match=f"did you mean '{near}'"):
        LLM(name)


@pytest.mark.parametrize(
    "name, says",
    [
        ("owner/absent", "the hub at http.* has no such model that you may see"),
        ("nothing", "the hub at http.* has no such model that you may see"),
        ("owner/empty", "on the hub has no config.json"),
        ("owner/broken", "cannot be reached.*503.*go online, or name a local folder"),
        ("no spaces/please", "has no such model"),
    ],
)
def test_the_hub_is_asked_once(asked, name, says):
    with quick(2), pytest.raises(UnknownModelError, match=says):
        LLM(name)
    assert len(asked) == (0 if " " in name else 1)


def test_a_model_that_the_hub_has_is_left_to_transformers(asked):
    for name in ("owner/there", "owner/gated"):
        assert loader.resolve(name) == name
    assert len(asked) == 2


def test_offline_is_told_apart_from_absent(asked, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_at(monkeypatch, f"http://127.0.0.1:{port}")
    with quick(2), pytest.raises(UnknownModelError, match="nothing of it is kept.*cannot be reach"):
        LLM("owner/there")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with quick(1), pytest.raises(UnknownModelError, match="HF_HUB_OFFLINE is set.*go online"):
        LLM("owner/there")


def test_a_hub_that_does_not_answer_costs_the_limit_once(asked, monkeypatch):
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
    with quick(1.4), pytest.raises(UnknownModelError, match="cannot be reached.*Timeout"):
        LLM("owner/slow")
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["owner/broken", "smollm2-135m-mine"])
def test_what_is_kept_serves_without_the_hub(asked, monkeypatch, tmp_path, name):
    """Also where its name is like an alias; after one question nobody is asked again."""
    folder = keep(tmp_path, name)
    if name != "owner/broken":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with quick(5), LLM(name, device="cpu", kv_format="exact", kv_cache_bytes=16 << 20) as llm:
        assert llm.model_name == name
    assert loader.resolve(name) == str(folder)
    assert len(asked) == (2 if name == "owner/broken" else 0)
