"""What most tests of the server share: a small model, served, and clients of it."""

from __future__ import annotations

import pytest

from support.served import served_llm, serving


@pytest.fixture(scope="module")
def make_llm():
    """Makes the `LLM` that is served; a module with another one overrides this."""
    return served_llm


@pytest.fixture(scope="module")
def reference(make_llm):
    return make_llm()


@pytest.fixture(scope="module")
def served(make_llm):
    with serving(make_llm()) as running:
        yield running
        running.settle()


@pytest.fixture
def client(served):
    with served.client() as found:
        yield found
