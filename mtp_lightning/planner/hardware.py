"""What known devices can do, from hardware.yaml."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from mtp_lightning.errors import MtpError
from mtp_lightning.recipe.loading.parse import parse_yaml

GIGA = 1e9
TERA = 1e12
MICRO = 1e-6
GIB = 2**30
FITTED = ("product_efficiency", "attention_efficiency", "exposed_communication")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A type of GPU, the node around it, and what was fitted to published runs on it."""

    name: str
    peak_flops_per_s: dict[str, float]  # by precision
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # to GPUs of the same node, one direction
    node_bytes_per_s: float  # of a whole node to others, one direction
    host_link_bytes_per_s: float
    host_memory_bytes_per_s: float
    disk_bytes_per_s: float
    link_hop_s: float
    node_hop_s: float
    product_efficiency: float
    attention_efficiency: float
    exposed_communication: float
    fitted_as: str  # type whose published runs the last three come from

    def peak(self, precision: str) -> float:
        """Operations per second at best."""
        return self.peak_flops_per_s[precision]


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = parse_yaml(files("mtp_lightning.planner").joinpath("hardware.yaml").read_text())
    return table


def known_hardware() -> list[str]:
    """List the types of GPU that can be planned for.

    >>> known_hardware()
    ['A100-40', 'A100-80', 'H100', 'H200', 'B200']
    """
    return list(_table()["planned"])


def hardware(name: str) -> Hardware:
    """Look up a type of GPU; raise MtpError for an unknown one.

    >>> hardware("H100").peak("bf16")
    989000000000000.0
    """
    table, names = _table(), {known.lower(): known for known in known_hardware()}
    if name.lower() not in names:
        raise MtpError(
            f"the GPU must be one of {', '.join(names.values())}",
            f"the unknown name {name!r}",
            "Choose one of these, or add an entry to mtp_lightning/planner/hardware.yaml.",
        )
    known = names[name.lower()]
    entry = table["planned"][known]
    fitted_as = entry.get("fitted_as", known)
    return Hardware(
        name=known,
        peak_flops_per_s={precision: TERA * entry[precision] for precision in ("bf16", "fp32")},
        memory_bytes=GIB * entry["memory_gib"],
        memory_bytes_per_s=GIGA * entry["memory_gb_per_s"],
        link_bytes_per_s=GIGA * entry["link_gb_per_s"],
        node_bytes_per_s=GIGA * entry["node_gb_per_s"],
        host_link_bytes_per_s=GIGA * entry["host_link_gb_per_s"],
        host_memory_bytes_per_s=GIGA * table["host"]["memory_gb_per_s"],
        disk_bytes_per_s=GIGA * table["host"]["disk_gb_per_s"],
        link_hop_s=MICRO * table["hops"]["link_us"],
        node_hop_s=MICRO * table["hops"]["node_us"],
        fitted_as=fitted_as,
        **{constant: table["planned"][fitted_as][constant] for constant in FITTED},
    )


def peak_flops_per_s(device_name: str, precision: str) -> float | None:
    """Look up what a device can do at best in a precision, `bf16` or `fp32`; None for an unknown device.

    >>> peak_flops_per_s("NVIDIA H100 80GB HBM3", "bf16")
    989000000000000.0
    >>> peak_flops_per_s("NVIDIA H100 PCIe", "bf16")
    756000000000000.0
    """
    for entry in _table()["devices"]:
        if all(word in device_name for word in entry["words"]):
            return TERA * float(entry[precision])
    return None
