"""Peak rates of known devices, from hardware.yaml."""

from importlib.resources import files

import yaml

TERA = 1e12


def peak_flops_per_s(device_name: str, precision: str) -> float | None:
    """Look up what a device can do at best in a precision, `bf16` or `fp32`; None for an unknown device.

    >>> peak_flops_per_s("NVIDIA H100 80GB HBM3", "bf16")
    989000000000000.0
    >>> peak_flops_per_s("NVIDIA H100 PCIe", "bf16")
    756000000000000.0
    """
    table = yaml.safe_load(files("mtp_lightning.planner").joinpath("hardware.yaml").read_text())
    for entry in table["devices"]:
        if all(word in device_name for word in entry["words"]):
            return TERA * float(entry[precision])
    return None
