"""What DeepSpeed 0.19 keeps of the modules of ZeRO-3 engines: its module `parameter_offload`, which holds it."""

from types import ModuleType

from torch import nn


def module_stack(offload: ModuleType) -> list[nn.Module]:
    """Modules whose forward DeepSpeed is in, the outermost first: between steps that one alone."""
    stack: list[nn.Module] = offload.FWD_MODULE_STACK
    return stack


def forget_modules(offload: ModuleType) -> None:
    """Empty what is kept of every engine for as long as the process lives.

    That is the outermost module, in a list, and what it was to release when, in a cache of a method. Can go when
    `engine.destroy()` does so.
    """
    module_stack(offload).clear()
    method = offload.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in method.__closure__:  # of the decorator around the cache
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
