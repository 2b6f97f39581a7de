"""The device of a run."""

import os
from pathlib import Path

import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.recipe.sections import Recipe


def prepare_device(recipe: Recipe) -> torch.device:
    """Choose the device that the recipe asks for and set its number of threads.

    Raises:
        TrainingError: The recipe asks for CUDA and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if recipe.run.device == "cuda" and not has_cuda:
        raise TrainingError(
            "run.device=cuda needs a CUDA device and a torch that can use it",
            f"none (torch {torch.__version__})",
            "Give run.device=cpu, or run where there is a GPU.",
        )
    is_cuda = has_cuda and recipe.run.device != "cpu"
    if not is_cuda:
        _check_cpu(recipe)
    _check_nvme(recipe)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    return torch.device("cuda" if is_cuda else "cpu")


def _check_cpu(recipe: Recipe) -> None:
    """Refuse what needs a GPU where run.device=auto finds none; a recipe that says `cpu` is refused when it is read."""
    strategy = recipe.strategy
    if (strategy.offload_optimizer, strategy.offload_parameters) != ("none", "none"):
        raise TrainingError(
            "offloading needs a GPU to offload from",
            f"none here, with strategy.offload_optimizer={strategy.offload_optimizer} and "
            f"strategy.offload_parameters={strategy.offload_parameters}",
            "Set both to none, or run where there is a GPU.",
        )
    if recipe.run.precision == "fp16":
        raise TrainingError(
            "run.precision=fp16 needs a GPU", "none here", "Set run.precision=bf16, or run where there is a GPU."
        )


def _check_nvme(recipe: Recipe) -> None:
    strategy = recipe.strategy
    if "nvme" in (strategy.offload_optimizer, strategy.offload_parameters):
        path = Path(strategy.nvme_path or "")
        if not path.is_dir() or not os.access(path, os.W_OK):
            raise TrainingError(
                "strategy.nvme_path must be a folder on this node that can be written to",
                str(path) if path.exists() else f"no {path}",
                "Give a folder on a local disk, or offload to cpu.",
            )
        raise TrainingError(
            "training offloads to cpu only: checkpoints cannot read what DeepSpeed has swapped to a disk yet",
            f"strategy.offload_optimizer={strategy.offload_optimizer}, "
            f"strategy.offload_parameters={strategy.offload_parameters}",
            "Offload to cpu, or use more GPUs; `mtp plan` counts with nvme.",
        )
