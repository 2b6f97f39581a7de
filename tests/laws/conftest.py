"""Fixtures of the laws."""

import sys

import pytest

from tests.support import warm
from tests.support.fake_cuda.client import fake_cuda


@pytest.fixture(scope="session")
def gpu():
    """Asks a process with a fake GPU (`tests/support/fake_cuda`)."""
    with fake_cuda() as ask:
        yield ask


@pytest.fixture
def warm_ranks(monkeypatch):
    """Let the ranks that this process starts be forked from a process that has imported everything."""
    monkeypatch.setattr(sys, "executable", str(warm.server().python))
