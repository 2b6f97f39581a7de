"""Joining the other ranks of a run, and leaving them."""

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # which torch.distributed has, without a type

from mtp_lightning.errors import LaunchError, TrainingError
from mtp_lightning.launch.rank_env import RankInfo, free_port, local_rank_info, rank_from_env
from mtp_lightning.launch.signals import ending_at_signals
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.device import check_own_device, prepare_device
from mtp_lightning.training.strategies.param_shards import listed

JOIN_TIMEOUT = timedelta(minutes=30)
SAY_AFTER_S, POLL_S = 60.0, 0.1
ALL_CAME = "all"
MEETING = "mtp/meeting"  # key of the newest


def met(rank_info: RankInfo) -> Store:
    """Wait until all ranks have come to the address of the first; return a store of their own that they share there.

    Raises:
        LaunchError: Naming the ranks that have not come in time, or why none can.
    """
    address, port = rank_info.main_address, rank_info.main_port
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    try:
        server = TCPStore(
            address, port, is_master=rank_info.rank == 0 and not is_served, timeout=JOIN_TIMEOUT, wait_for_workers=False
        )
        return _joined_by_all(server, rank_info)
    except dist.DistError as error:
        raise LaunchError(
            f"rank 0 must open a port that all ranks reach: {address}:{port} (MASTER_ADDR, MASTER_PORT)",
            str(error).splitlines()[0],
            "Look at the log of rank 0, name its node in MASTER_ADDR, and take a MASTER_PORT that is free there.",
        ) from error


def _joined_by_all(server: Store, rank_info: RankInfo) -> Store:
    """Poll until all ranks have come to the newest meeting; say which have not after a while, and at the end.

    torchrun's store outlives restarts, and its agents count restarts each for itself, so that the first rank opens a
    meeting with a new name. Others may hear of the one before, which their own numbers have come to: they wait on.
    """
    began, has_said = time.monotonic(), False
    size = f"{rank_info.num_ranks} ranks"
    name = ""
    store: Store | None = None
    if rank_info.rank == 0:
        server.set(MEETING, f"{size}/{uuid.uuid4().hex}")
    while True:
        newest = server.get(MEETING).decode() if server.check([MEETING]) else ""
        if newest != name and newest.startswith(size):
            name, store = newest, PrefixStore(f"mtp/{newest}", server)
            if store.add(f"came/{rank_info.rank}", 1) > 1:
                store = None  # another process with this rank was there
        if store is not None and _have_all_come(store, rank_info):
            return store
        waited_s = time.monotonic() - began
        is_over = waited_s > JOIN_TIMEOUT.total_seconds()
        if is_over or (waited_s > SAY_AFTER_S and not has_said):
            has_said = True
            names = listed(list(map(str, [0] if store is None else _missing(store, rank_info))))
            if is_over:
                raise LaunchError(
                    f"all {rank_info.num_ranks} ranks must meet within {JOIN_TIMEOUT.total_seconds() / 60:g} minutes",
                    f"rank {names} missing at {rank_info.main_address}:{rank_info.main_port}",
                    "Look at their logs, and whether their nodes reach that address.",
                )
            print(f"rank {rank_info.rank} waits for rank {names}", file=sys.stderr, flush=True)
        time.sleep(POLL_S)


def _have_all_come(store: Store, rank_info: RankInfo) -> bool:
    """Ask for one key; only the first rank looks for every other, so a thousand ranks ask a thousand times a round."""
    if rank_info.rank == 0 and not _missing(store, rank_info):
        store.set(ALL_CAME, "")
    return bool(store.check([ALL_CAME]))


def _missing(store: Store, rank_info: RankInfo) -> list[int]:
    return [rank for rank in range(rank_info.num_ranks) if not store.check([f"came/{rank}"])]


@contextlib.contextmanager
def process_group(recipe: Recipe) -> Iterator[None]:
    """Form the process group of the recipe's ranks around the body; without ZeRO there is none.

    Raises:
        TrainingError: The number of processes that were started is not the recipe's number of ranks, or two of them
            have one GPU.
    """
    started = rank_from_env(os.environ)
    num_started = started.num_ranks if started else 1
    if num_started != recipe.strategy.num_ranks:
        raise TrainingError(
            "as many processes must be started as the recipe has ranks (strategy.num_nodes x ranks_per_node)",
            f"{num_started} started, {recipe.strategy.num_ranks} in the recipe"
            f"{', by the variables of torchrun, srun or mpirun here' if started else ''}",
            "Start that many (srun --nodes=… --ntasks-per-node=…), change strategy.num_nodes and "
            "strategy.ranks_per_node, or unset RANK and WORLD_SIZE if nothing has started ranks.",
        )
    if recipe.strategy.kind == "single":
        yield
        return
    rank_info = started or local_rank_info(0, 1, free_port())
    os.environ.update(rank_info.environment)  # the names that torch, Lightning and DeepSpeed look for
    device = prepare_device(recipe)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed 0.19 takes it for the number of its GPU
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others, and says so
    place = f"rank {rank_info.rank} of {rank_info.num_ranks}, to meet at {rank_info.main_address}:{rank_info.main_port}"
    with ending_at_signals(f"waiting for the other ranks ({place})"):  # torch waits for them in C++
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store = met(rank_info)
        dist.init_process_group(
            backend, store=store, rank=rank_info.rank, world_size=rank_info.num_ranks, timeout=JOIN_TIMEOUT
        )
    try:
        check_own_device(Ranks(), device)
        yield
        Ranks().wait()
    finally:
        dist.destroy_process_group()
