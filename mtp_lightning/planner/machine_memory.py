"""Whether what stays between steps can lie in a machine's memory at all, before any of it is allocated."""

from pathlib import Path

from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.memory import memory
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.recipe.loading.phases import phases_of
from mtp_lightning.recipe.schema.root import Recipe

KIB = 1024


def least_bytes(recipe: Recipe) -> tuple[float, float]:
    """Return the bytes of weights and optimizer state of a rank, on its device and offloaded; of its largest phase.

    Gradients, activations and buffers come on top: what is larger than a memory by these two alone cannot be trained.

    >>> least_bytes(Recipe()) == (12 * 6_558_464, 0)
    True
    """
    needed = [
        memory(shape_of(each), layout_of(each)) for each in [phase.recipe for phase in phases_of(recipe)] or [recipe]
    ]
    return max(each.weights + each.optimizer for each in needed), max(each.offloaded for each in needed)


def host_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process may have: the machine's with its swap, or the limits of its control groups.

    Args:
        root: where proc and sys lie.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    sizes = {name: int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in lines)}
    swap = sizes.get("SwapTotal", 0)
    return min([sizes["MemTotal"], *_group_limits(root)]) + swap


def _group_limits(root: Path) -> list[int]:
    """List the limits of this process's control groups, of both versions; in a container they begin at its root."""
    limits = []
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in groups:
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        if controllers and "memory" not in controllers.split(","):
            continue
        own = Path(path.lstrip("/"))
        for folder in (own, *own.parents):
            try:
                text = (top / folder / name).read_text().strip()
            except OSError:
                continue
            limits += [int(text)] if text.isdecimal() else []
    return limits
