"""Resident memory is memory in use, in a process that is set up for it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mtp_lightning.bench.training import peak_memory as peak
from mtp_lightning.bench.training.peak_memory import MALLOC_ENVIRONMENT, PeakMeter
from mtp_lightning.errors import TrainingError

MIB = 2**20
PROGRAM = """
import json, torch
from mtp_lightning.bench.training.peak_memory import PeakMeter
def touch(mib):
    pieces = [torch.ones(2**18) for _ in range(mib)]  # of 1 MiB each
touch(8)
meter, peaks = PeakMeter(torch.device("cpu")), []
for mib in (200, 50, 120):
    meter.reset()
    touch(mib)
    peaks.append(meter.peak_bytes())
print(json.dumps(peaks))
"""


def test_each_peak_is_its_own():
    """A large peak before a small one leaves nothing behind."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **MALLOC_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = json.loads(process.stdout)
    assert [round(found / MIB) for found in peaks] == pytest.approx([200, 50, 120], abs=3)


def test_a_kernel_that_does_not_tell(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("VmSize:\t1 kB\n")
    monkeypatch.setattr(peak, "STATUS", status)
    with pytest.raises(TrainingError) as caught:
        PeakMeter(torch.device("cpu"))
    assert "VmRSS" in caught.value.expected


def test_a_peak_that_cannot_be_reset_stands(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    meter = PeakMeter(torch.device("cpu"))
    meter.reset()
    assert meter.peak_bytes() >= 0
