"""What a key opens, and what its holder learns of the requests of other keys."""

from __future__ import annotations

import itertools
import urllib.error
import urllib.request

import pytest

from spectral_paged.cli.commands import main
from spectral_paged.server.api_keys import salt_of
from support.served import LONG, VALUES, served_llm, serving

GREEDY = VALUES | {"max_tokens": 1}


def cached_tokens(served, key, prompt, **extra):
    with served.client(api_key=key) as client:
        answer = client.completions.create(prompt=prompt, extra_body=extra, **GREEDY)
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("guess", [LONG, LONG[:200], LONG[:200][::-1]], ids=["all", "part", "no"])
def test_a_key_learns_nothing_of_another_keys_prompts(guess):
    with serving(served_llm(), api_keys=("a", "b")) as served:
        cached_tokens(served, "a", LONG)
        assert cached_tokens(served, "b", guess) == 0
        assert cached_tokens(served, "a", LONG) > 0, "a key has its own prompts in the cache"


@pytest.mark.parametrize(
    "keys, per_key, shares",
    [(("a", "b"), None, False), (("a", "b"), False, True), (("a",), None, True), ((), None, True)],
    ids=["several keys", "switched off", "one key", "no key"],
)
def test_keys_have_caches_of_their_own_where_there_are_several(keys, per_key, shares):
    with serving(served_llm(), api_keys=keys, prefix_cache_per_key=per_key) as served:
        assert served.service.settings.salts_by_key is not shares
        for key in ("a", "b")[: len(keys) or 2]:
            found = cached_tokens(served, key, LONG)
        last = cached_tokens(served, "a", LONG[:200])
        assert last > 0
        assert (found > 0) is (shares and len(keys) != 1)


def test_a_salt_of_the_clients_own_joins_that_of_its_key():
    with serving(served_llm(), api_keys=("a", "b")) as served:
        for key, salt in itertools.product("ab", ("one", "two")):
            assert cached_tokens(served, key, LONG, cache_salt=salt) == 0
        for key, salt in itertools.product("ab", ("one", "two")):
            assert cached_tokens(served, key, LONG, cache_salt=salt) > 0
        # what key b can spell is its own
        spelled = salt_of("a", "one")
        assert cached_tokens(served, "b", LONG, cache_salt=spelled) == 0


def test_salts_of_keys_are_all_different():
    keys = ["", "a", "b", "ab", "a" * 200]
    salts = ["", "a", "b", salt_of("a", ""), salt_of("b", "a")]
    pairs = list(itertools.product(keys, salts))
    assert len({salt_of(*pair) for pair in pairs}) == len(pairs)
    assert not any(key in salt_of(key, "") for key in ("a" * 200, "secret"))


def scrape(served, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{served.url}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_open_to_their_own_key_alone(capsys, monkeypatch):
    with serving(served_llm(), api_keys=("a",), metrics_key="m") as served:
        for key in (None, "", "a", "mm"):
            status, text = scrape(served, key)
            assert status == 401 and "spectral_paged" not in text
        assert scrape(served, "m")[0] == 200
        with served.client(api_key="m") as client, pytest.raises(Exception, match="API key"):
            client.models.list()
        with urllib.request.urlopen(f"{served.url}/health") as answer:
            assert answer.status == 200
        assert main(["top", served.url]) == 2
        assert "--metrics-key" in capsys.readouterr().err
        assert main(["top", served.url, "--metrics-key", "m"]) == 0
        monkeypatch.setenv("SPECTRAL_PAGED_METRICS_KEY", "m")
        assert main(["top", served.url]) == 0


def test_metrics_are_open_where_no_key_is_set():
    with serving(served_llm(), api_keys=("a",)) as served:
        assert scrape(served, None)[0] == 200
