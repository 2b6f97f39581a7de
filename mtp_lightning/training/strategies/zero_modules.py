"""What DeepSpeed 0.19 keeps of the modules of ZeRO-3 engines, in globals of its own."""

from torch import nn


def module_stack() -> list[nn.Module]:
    """Modules whose forward DeepSpeed 0.19 is in, the outermost first: between steps that one alone."""
    from deepspeed.runtime.zero import parameter_offload

    stack: list[nn.Module] = parameter_offload.FWD_MODULE_STACK
    return stack


def forget_modules() -> None:
    """Empty what DeepSpeed 0.19 keeps of every ZeRO-3 engine for as long as the process lives.

    That is the outermost module, in a list, and what it was to release when, in a cache of a method. Can go when
    `engine.destroy()` does so.
    """
    from deepspeed.runtime.zero import parameter_offload

    module_stack().clear()
    method = parameter_offload.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in method.__closure__:  # of the decorator around the cache
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
