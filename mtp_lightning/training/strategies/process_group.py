"""Joining the other ranks of a run, and leaving them."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from mtp_lightning.errors import TrainingError
from mtp_lightning.launch.rank_env import free_port, local_rank_info, rank_from_env
from mtp_lightning.launch.signals import ending_at_signals
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.device import check_own_device, prepare_device

JOIN_TIMEOUT = timedelta(minutes=30)


@contextlib.contextmanager
def process_group(recipe: Recipe) -> Iterator[None]:
    """Form the process group of the recipe's ranks around the body; without ZeRO there is none.

    Raises:
        TrainingError: The number of processes that were started is not the recipe's number of ranks, or two of them
            have one GPU.
    """
    if recipe.strategy.kind == "single":
        yield
        return
    rank_info = rank_from_env(os.environ) or local_rank_info(0, 1, free_port())
    if rank_info.num_ranks != recipe.strategy.num_ranks:
        raise TrainingError(
            "as many processes must be started as the recipe has ranks (strategy.num_nodes x ranks_per_node)",
            f"{rank_info.num_ranks} started, {recipe.strategy.num_ranks} in the recipe",
            "Start that many (srun --nodes=… --ntasks-per-node=…), or change strategy.num_nodes and "
            "strategy.ranks_per_node.",
        )
    os.environ.update(rank_info.environment)  # the names that torch, Lightning and DeepSpeed look for
    device = prepare_device(recipe)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed 0.19 takes it for the number of its GPU
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others, and says so
    place = f"rank {rank_info.rank} of {rank_info.num_ranks}, to meet at {rank_info.main_address}:{rank_info.main_port}"
    with ending_at_signals(f"waiting for the other ranks ({place})"):  # torch waits for them in C++
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=JOIN_TIMEOUT)
    try:
        check_own_device(Ranks(), device)
        yield
        Ranks().wait()
    finally:
        dist.destroy_process_group()
