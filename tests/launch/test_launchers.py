"""Every launcher's variables lead to the same ranks, or to words; one table for all of them."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest

from mtp_lightning.errors import LaunchError, TrainingError
from mtp_lightning.launch.local import needs_ranks
from mtp_lightning.launch.rank_env import MPI_VARIABLES, rank_from_env
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies import process_group as joining
from tests.support import warm
from tests.support.runs import ROOT

STEP = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}
ALONE = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OPEN_MPI, MVAPICH, MPICH = (dict(zip(names, ("1", "2", "1", "2"), strict=True)) for names in MPI_VARIABLES)


def place(environment):
    """Rank, ranks, local rank, local ranks and node."""
    found = rank_from_env(environment)
    return found and (found.rank, found.num_ranks, found.local_rank, found.local_ranks, found.node)


FOUR = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
AT = {"MASTER_ADDR": "n0"}
STARTED = {
    "torchrun": (TORCHRUN | MEET, (1, 2, 1, 2, 0)),
    "Kubeflow": ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "1"}, (1, 2, 0, 1, 1)),
    "Kubeflow's first": ({"RANK": "0", "WORLD_SIZE": "2"} | MEET, (0, 2, 0, 2, 0)),
    "by hand": ({"RANK": "1", "WORLD_SIZE": "2"} | MEET, (1, 2, 1, 2, 0)),
    "srun": (STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, (1, 2, 1, 2, 0)),
    "srun over mpirun": (
        OPEN_MPI | STEP | dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), "3") | FOUR,
        (3, 4, 3, 4, 0),
    ),
    "Open MPI": (OPEN_MPI, (1, 2, 1, 2, 0)),
    "MVAPICH": (MVAPICH, (1, 2, 1, 2, 0)),
    "MPICH": (MPICH, (1, 2, 1, 2, 0)),
    "MPI on two nodes": (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"} | AT, (3, 4, 1, 2, 1)),
    "srun --pty": (ALONE, None),
    "mpirun -n 1": (dict(zip(MPI_VARIABLES[0], "0101", strict=True)), None),
    "salloc": ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8"}, None),
    "a shell": ({}, None),
}


@pytest.mark.parametrize("launcher", STARTED)
def test_a_launcher_names_the_rank(launcher):
    environment, expected = STARTED[launcher]
    assert place(environment) == expected


REFUSED = {
    "a rank that is none of them": (TORCHRUN | MEET | {"RANK": "2"}, "2 of 2"),
    "a rank below all": (TORCHRUN | MEET | {"RANK": "-1"}, "-1 of 2"),
    "a rank in words": (TORCHRUN | MEET | {"RANK": "one"}, "RANK must be a whole number"),
    "an empty number": (TORCHRUN | MEET | {"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number"),
    "no port": (TORCHRUN, "MASTER_PORT must be a whole number"),
    "a port in words": (TORCHRUN | MEET | {"MASTER_PORT": "abc"}, "MASTER_PORT must be a whole number"),
    "a port that is none": (TORCHRUN | MEET | {"MASTER_PORT": "70000"}, "70000"),
    "no task": (STEP | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID must be a whole number"),
    "tasks in words": (STEP | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS must be a whole number"),
    "no task at all": (STEP | {"SLURM_STEP_NUM_TASKS": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "0 of 0"),
    "MPI without a meeting place": (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "no MASTER_ADDR"),
    "MPI without a local rank": ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID must be a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    environment, found = REFUSED[case]
    with pytest.raises(LaunchError) as caught:
        rank_from_env(environment)
    assert found in str(caught.value)


def recipe(kind="zero2", **strategy):
    return Recipe.model_validate({"run": {"device": "cpu"}, "strategy": {"kind": kind, **strategy}})


def test_an_interactive_allocation_lets_a_recipe_start_its_ranks():
    assert needs_ranks(recipe(ranks_per_node=2), ALONE)
    assert not needs_ranks(recipe(kind="single"), ALONE)
    assert not needs_ranks(recipe(ranks_per_node=2), OPEN_MPI)


@pytest.mark.parametrize("own", [recipe(kind="single"), recipe(ranks_per_node=4)], ids=["one rank", "four"])
def test_another_number_of_ranks_than_the_recipes_is_refused(own, monkeypatch):
    for name, value in (TORCHRUN | MEET).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(TrainingError, match="2 started, . in the recipe, by the variables of .* unset RANK"),
        joining.process_group(own),
    ):
        pass


def ranked(monkeypatch, rank, num_ranks, port):
    monkeypatch.setattr(joining, "JOIN_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(joining, "SAY_AFTER_S", 0.2)
    names = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    return recipe(ranks_per_node=num_ranks)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_ranks_that_never_come_are_named(monkeypatch, capsys):
    own = ranked(monkeypatch, 0, 3, free_port())
    with (
        pytest.raises(LaunchError, match=r"all 3 ranks must meet.*rank 1, 2 missing at 127"),
        joining.process_group(own),
    ):
        pass
    assert "rank 0 waits for rank 1, 2" in capsys.readouterr().err


def test_a_first_rank_that_never_comes_is_named(monkeypatch):
    own = ranked(monkeypatch, 1, 2, free_port())
    with pytest.raises(LaunchError, match=r"rank 0 must open a port"), joining.process_group(own):
        pass


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own = ranked(monkeypatch, 0, 2, taken.getsockname()[1])
        with pytest.raises(LaunchError, match="take a MASTER_PORT that is free"), joining.process_group(own):
            pass


SMALL = ("run.steps=1", "run.validation_samples=2", "data.seq_len=16", "run.threads=1", "data.corpus=[text]")
RANKS = ("strategy.kind=zero2", "strategy.ranks_per_node=2", "batch.micro_batch_size=1", "batch.global_batch_size=4")
WORLDS = {
    "srun --pty": [ALONE],
    "Kubeflow": [{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} for rank in range(2)],
    "mpirun": [dict(zip(MPI_VARIABLES[0], (str(rank), "2", str(rank), "2"), strict=True)) for rank in range(2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", WORLDS)
def test_a_recipe_of_two_ranks_trains_under(launcher, tmp_path):
    Path(tmp_path, "text").mkdir()
    for number in range(30):
        Path(tmp_path, f"text/{number}.txt").write_text(f"some text of {number} " * 20)
    port = {"MASTER_PORT": str(free_port())} if launcher != "srun --pty" else {}
    words = ("train", str(ROOT / "recipes/debug/parallel.yaml"), *SMALL, *RANKS, "run.dir=r")
    ranks = [warm.start(*words, cwd=tmp_path, environment=os.environ | own | port) for own in WORLDS[launcher]]
    for rank in ranks:
        assert rank.wait(300) == 0, rank.output(1)
    assert Path(tmp_path, "r/checkpoints/step-00000001/MANIFEST.json").is_file()
