"""What the tests of benchmarks share."""

import pytest


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    """One step per sample: what is tested is not how fast this machine is."""
    monkeypatch.setattr("mtp_lightning.bench.training.rounds.SAMPLE_S", 1e-9)
    monkeypatch.setattr("mtp_lightning.bench.training.rounds.PRODUCT_WIDTH", 64)
