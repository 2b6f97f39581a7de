"""Fixtures of the laws."""

import pytest

from tests.support.fake_cuda.client import fake_cuda


@pytest.fixture(scope="session")
def gpu():
    """Asks a process with a fake GPU (`tests/support/fake_cuda`)."""
    with fake_cuda() as ask:
        yield ask
