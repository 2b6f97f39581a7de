"""The table of device peaks."""

import pytest

from mtp_lightning.planner.hardware import peak_flops_per_s


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
    ],
)
def test_known_devices(name, peak):
    assert peak_flops_per_s(name, "bf16") == peak
    fp32 = peak_flops_per_s(name, "fp32")
    assert fp32 is not None
    assert fp32 < peak / 10


def test_unknown_device():
    assert peak_flops_per_s("Some other device", "bf16") is None
