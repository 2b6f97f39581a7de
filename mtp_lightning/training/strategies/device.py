"""The device of a run, and which one of its kind is this rank's."""

import os
import platform
from pathlib import Path

import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.launch.rank_env import rank_from_env
from mtp_lightning.losses.liger import check_liger
from mtp_lightning.losses.row_losses import LossKernel
from mtp_lightning.planner.machine_memory import host_bytes, least_bytes
from mtp_lightning.planner.memory import GIB
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.document_attention import attends_one_by_one
from mtp_lightning.recipe.schema.root import Recipe


def prepare_device(recipe: Recipe) -> torch.device:
    """Choose this rank's device, as the recipe asks, make it the current one, and set the number of threads.

    The one place that knows which GPU is whose. A rank that sees all GPUs of its node takes the one of its own number
    there; one that sees fewer, because the scheduler binds GPUs to tasks, counts in those.

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
    loss_kernel_on(recipe, torch.device("cuda" if is_cuda else "cpu"))
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    if not is_cuda:
        return torch.device("cpu")
    place = rank_from_env(os.environ) if recipe.strategy.kind != "single" else None
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count() if place else 0)
    torch.backends.cuda.enable_cudnn_sdp(not _may_mask(recipe))
    torch.cuda.set_device(device)  # else NCCL, and whoever asks for "cuda", would take the first on every rank
    return device


def loss_kernel_on(recipe: Recipe, device: torch.device) -> LossKernel:
    """Return what computes the losses of a run on a device.

    Raises:
        TrainingError: It is not installed, or does not run there.
    """
    if recipe.memory.loss_kernel == "liger":
        check_liger(device)
    return recipe.memory.loss_kernel


def _may_mask(recipe: Recipe) -> bool:
    """Tell whether attention of a run may take a mask, with which cuDNN's has a gradient of NaN (pytorch#196678).

    Its lengths do not change, so it is the fastest where there is none. The workaround can go when torch has the mend.
    """
    masks_documents = recipe.data.document_mask and not attends_one_by_one(recipe, "cuda")
    return masks_documents or recipe.model.is_foreign or recipe.objective.rollout is not None


def check_memory(recipe: Recipe, device: torch.device) -> None:
    """Refuse a model that cannot be held, before any of it is there: by weights and optimizer state alone.

    Raises:
        TrainingError: They are larger than the memory of the device, or of the host.
    """
    on_device, offloaded = least_bytes(recipe)
    on_host = recipe.strategy.ranks_per_node * (offloaded if device.type == "cuda" else on_device)
    limits = [(on_host, host_bytes(), "this machine's memory (swap and limits of its control groups counted)")]
    if device.type == "cuda":
        limits.append((on_device, torch.cuda.get_device_properties(device).total_memory, "the memory of a GPU here"))
    for needed, there, what in limits:
        if needed > there:
            raise TrainingError(
                f"weights and optimizer state must fit into {what}",
                f"{needed / GIB:,.1f} GiB of them by `mtp plan`, and {there / GIB:,.1f} GiB",
                "Make the model smaller, or spread it over more ranks or nodes (strategy.kind=zero3).",
            )


def check_own_device(ranks: Ranks, device: torch.device) -> None:
    """Refuse two ranks on one GPU, which NCCL answers with an error that names neither; all ranks call it.

    Raises:
        TrainingError: Naming them.
    """
    if device.type != "cuda":
        return
    own = (platform.node(), str(torch.cuda.get_device_properties(device).uuid))
    owners: dict[tuple[str, str], list[int]] = {}
    for rank, gpu in enumerate(ranks.gather(own)):
        owners.setdefault(gpu, []).append(rank)
    shared = [f"ranks {', '.join(map(str, own))} on {host}" for (host, _), own in owners.items() if len(own) > 1]
    if shared:
        raise TrainingError(
            "every rank must have a GPU of its own",
            f"one GPU for {'; one for '.join(shared)}",
            "Start at most as many ranks per node as it has GPUs (strategy.ranks_per_node), and let each see all of "
            "them or its own (srun --gpus-per-task=1, CUDA_VISIBLE_DEVICES).",
        )


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
