"""The device of a run."""

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
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    return torch.device("cuda" if has_cuda and recipe.run.device != "cpu" else "cpu")
