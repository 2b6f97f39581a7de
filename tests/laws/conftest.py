"""Fixtures of the laws."""

import sys

import pytest

from tests.support import warm


@pytest.fixture
def warm_ranks(monkeypatch):
    """Let the ranks that this process starts be forked from a process that has imported everything."""
    monkeypatch.setattr(sys, "executable", str(warm.server().python))
