"""Which rank this process is, read from what started it: torchrun, srun, mpirun, or `mtp train` itself."""

import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from mtp_lightning.errors import LaunchError

FIRST_PORT = 20_000  # ports from here on; the job's number picks one, so that jobs on one node do not meet
NUM_PORTS = 12_000  # below the range that kernels give to outgoing connections
LOCAL_PORTS = range(10_000, FIRST_PORT)  # for ranks that are started here
VALID_PORTS = range(1, 65_536)
HINT = "start ranks with srun, torchrun, mpirun or a plain `mtp train` (without RANK and WORLD_SIZE)"
THIS_HOST = "127.0.0.1"
MPI_VARIABLES = (
    *(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),),
    *(("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),),
    *(("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),),
)
"""Rank, number of ranks, and the same on the node: of Open MPI, of MVAPICH, of MPICH and Intel MPI."""


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """A process's place among the ranks of a run."""

    rank: int
    num_ranks: int
    local_rank: int
    local_ranks: int  # on this node
    node: int
    main_address: str
    main_port: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables that torch, Lightning and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_ranks),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.main_address,
            "MASTER_PORT": str(self.main_port),
        }


def rank_from_env(environment: Mapping[str, str]) -> RankInfo | None:
    """Read this process's rank_info; None where nothing has started it as one of several.

    A step of one task (`srun --pty bash`, a notebook in an allocation) or an `mpirun -n 1` has started it alone: a
    recipe of several ranks starts them itself there.

    Raises:
        LaunchError: A variable is missing or is not a number, or there can be no such rank_info.
    """
    rank_info: RankInfo | None = None
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank_info = _from_torchrun(environment)
    elif "SLURM_STEP_ID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        rank_info = _from_slurm(environment) if _number(environment, "SLURM_STEP_NUM_TASKS") != 1 else None
    else:
        for names in MPI_VARIABLES:
            if names[0] in environment and names[1] in environment and _number(environment, names[1]) != 1:
                rank_info = _from_mpi(environment, *names)
                break
    if rank_info is not None:
        _check(rank_info)
    return rank_info


def check_rank_variables(environment: MutableMapping[str, str]) -> None:
    """Check what Lightning reads as numbers when it is imported; RANK and WORLD_SIZE are unset where both are empty.

    Raises:
        LaunchError: A variable is not a number.
    """
    if not any(environment.get(name) for name in ("RANK", "WORLD_SIZE")):  # as templates of containers leave them
        for name in ("RANK", "WORLD_SIZE"):
            environment.pop(name, None)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):  # Lightning 2.6
        if name in environment:
            _number(environment, name)


def started_ranks(environment: Mapping[str, str]) -> list[str]:
    """List the overrides that make a recipe one of as many ranks as have been started; none where this is no rank.

    Raises:
        LaunchError: The agents of torchrun share a store that they do not find again when the first of them changes.

    >>> started_ranks({"RANK": "0", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"})
    ['strategy.num_nodes=3', 'strategy.ranks_per_node=2']
    """
    rank_info = rank_from_env(environment)
    if rank_info is None:
        return []
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torch 2.13
        raise LaunchError(
            "elastic ranks must not meet in the store of torchrun's first agent: others miss it when another is first",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1",
            "Give on every node: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun …",
        )
    num_nodes, rest = divmod(rank_info.num_ranks, rank_info.local_ranks)
    num_nodes, local_ranks = (rank_info.num_ranks, 1) if rest else (num_nodes, rank_info.local_ranks)
    return [f"strategy.num_nodes={num_nodes}", f"strategy.ranks_per_node={local_ranks}"]


def local_rank_info(rank: int, num_ranks: int, port: int) -> RankInfo:
    """Make a rank_info on this machine, where all ranks are."""
    return RankInfo(
        rank=rank,
        num_ranks=num_ranks,
        local_rank=rank,
        local_ranks=num_ranks,
        node=0,
        main_address=THIS_HOST,
        main_port=port,
    )


def free_port() -> int:
    """Find a port of this machine that nobody listens on, by chance among `LOCAL_PORTS`.

    The first rank listens there seconds later. A port that the kernel picks may be given away again in the meantime.

    Raises:
        LaunchError: There is none.
    """
    import errno
    import random
    import socket

    for port in random.SystemRandom().sample(LOCAL_PORTS, len(LOCAL_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise
            return port
    raise LaunchError(
        f"one of the ports {LOCAL_PORTS.start} to {LOCAL_PORTS.stop - 1} must be free for ranks to meet at",
        "all are in use",
        "End what uses them, or start the ranks with torchrun --master-port",
    )


def _from_torchrun(environment: Mapping[str, str]) -> RankInfo:
    """Read torchrun's variables; without LOCAL_RANK, as in Kubeflow, ranks that meet at another host are alone here."""
    rank, num_ranks = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    main_address = environment.get("MASTER_ADDR", THIS_HOST)
    is_alone = "LOCAL_RANK" not in environment and not _is_this_host(main_address)
    return RankInfo(
        rank=rank,
        num_ranks=num_ranks,
        local_rank=_number(environment, "LOCAL_RANK", 0 if is_alone else rank),
        local_ranks=_number(environment, "LOCAL_WORLD_SIZE", 1 if is_alone else num_ranks),
        node=_number(environment, "GROUP_RANK", rank if is_alone else 0),
        main_address=main_address,
        main_port=_number(environment, "MASTER_PORT"),
    )


def _is_this_host(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def _from_mpi(environment: Mapping[str, str], rank: str, num_ranks: str, local_rank: str, local_ranks: str) -> RankInfo:
    own, all_ranks, own_local = (_number(environment, name) for name in (rank, num_ranks, local_rank))
    num_local = _number(environment, local_ranks, all_ranks)
    if num_local < all_ranks and "MASTER_ADDR" not in environment:
        raise LaunchError(
            "the ranks that mpirun starts on several nodes must be told where to meet, by MASTER_ADDR",
            f"{num_local} of {all_ranks} ranks on this node, and no MASTER_ADDR",
            "Give the first node: mpirun -x MASTER_ADDR=NODE (Open MPI) or -genv MASTER_ADDR NODE, or use srun",
        )
    job = zlib.crc32(environment.get("PMIX_NAMESPACE", "").encode(errors="replace"))
    return RankInfo(
        rank=own,
        num_ranks=all_ranks,
        local_rank=own_local,
        local_ranks=num_local,
        node=own // max(num_local, 1),
        main_address=environment.get("MASTER_ADDR") or THIS_HOST,
        main_port=_number(environment, "MASTER_PORT", FIRST_PORT + job % NUM_PORTS),
    )


def _from_slurm(environment: Mapping[str, str]) -> RankInfo:
    num_ranks = _number(environment, "SLURM_STEP_NUM_TASKS")
    num_nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or THIS_HOST
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID")
    return RankInfo(
        rank=_number(environment, "SLURM_PROCID"),
        num_ranks=num_ranks,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_ranks=num_ranks // num_nodes,
        node=_number(environment, "SLURM_NODEID", 0),
        main_address=environment.get("MASTER_ADDR") or first_host(nodes),
        main_port=_number(environment, "MASTER_PORT", FIRST_PORT + (13 * job + step) % NUM_PORTS),
    )


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list.

    >>> [first_host(nodes) for nodes in ("n1,n2", "gpu[003-016,020]", "rack1-[7,9]-ib", "alone")]
    ['n1', 'gpu003', 'rack1-7-ib', 'alone']
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # commas inside brackets separate numbers
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _check(rank_info: RankInfo) -> None:
    for name, rank in (("RANK or SLURM_PROCID", rank_info.rank), ("LOCAL_RANK or SLURM_LOCALID", rank_info.local_rank)):
        if not 0 <= rank < rank_info.num_ranks:
            raise LaunchError(
                f"{name} must be at least 0 and below the number of ranks, WORLD_SIZE or SLURM_STEP_NUM_TASKS",
                f"{rank} of {rank_info.num_ranks}",
                f"Correct them, or {HINT}",
            )
    if rank_info.main_port not in VALID_PORTS:
        raise LaunchError(
            f"MASTER_PORT must be a port for the ranks to meet at, {VALID_PORTS.start} to {VALID_PORTS.stop - 1}",
            str(rank_info.main_port),
            f"Correct it, or {HINT}",
        )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise LaunchError(
            f"the environment variable {name} must be a whole number: by it the ranks of a run find each other",
            "none" if value is None else repr(value),
            f"Correct it, or {HINT}",
        ) from None
