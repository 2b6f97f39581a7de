"""Which rank a process is, read from torchrun's or Slurm's variables."""

import pytest
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.errors import LaunchError
from mtp_lightning.launch import rank_env as rank_info
from mtp_lightning.launch.rank_env import (
    FIRST_PORT,
    LOCAL_PORTS,
    NUM_PORTS,
    check_rank_variables,
    first_host,
    free_port,
    local_rank_info,
    rank_from_env,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_plain_shell_gives_no_seat():
    assert rank_from_env({}) is None
    assert rank_from_env({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}) is None  # inside salloc or sbatch, before srun
    assert rank_from_env({"RANK": "0"}) is None


def test_torchrun():
    rank_info = rank_from_env(TORCHRUN)
    assert rank_info.environment == TORCHRUN
    assert (rank_info.rank, rank_info.num_ranks, rank_info.local_rank, rank_info.local_ranks, rank_info.node) == (
        5,
        8,
        1,
        4,
        1,
    )


def test_torchrun_of_one_node_may_say_less():
    few = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}
    rank_info = rank_from_env(few)
    assert (rank_info.local_ranks, rank_info.node, rank_info.main_address) == (2, 0, "127.0.0.1")


def test_slurm():
    rank_info = rank_from_env(SLURM)
    assert (rank_info.rank, rank_info.num_ranks, rank_info.local_rank, rank_info.local_ranks, rank_info.node) == (
        5,
        8,
        1,
        4,
        1,
    )
    assert rank_info.main_address == "gpu03"
    assert FIRST_PORT <= rank_info.main_port < FIRST_PORT + NUM_PORTS


def test_all_tasks_of_a_step_meet_and_two_steps_do_not():
    tasks = [rank_from_env(SLURM | {"SLURM_PROCID": str(rank)}) for rank in range(8)]
    assert len({(task.main_address, task.main_port) for task in tasks}) == 1
    ports = {
        rank_from_env(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).main_port
        for job in (1234, 1235, 1236)
        for step in (0, 1)
    }
    assert len(ports) == 6


def test_slurm_with_address_and_port_given():
    rank_info = rank_from_env(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (rank_info.main_address, rank_info.main_port) == ("10.0.0.1", 4000)


def test_torchrun_goes_before_slurm():
    assert rank_from_env(SLURM | TORCHRUN).main_port == 29500  # torchrun inside of a Slurm job


def test_a_seat_survives_its_own_environment():
    rank_info = local_rank_info(1, 2, 4321)
    assert rank_from_env(rank_info.environment) == rank_info


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-016,020]", "gpu003"),
        ("gpu[7]", "gpu7"),
        ("gpu[7,9-12],login1", "gpu7"),
        ("login1,gpu[7,9-12]", "login1"),
        ("rack1-[7,9]-ib", "rack1-7-ib"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("a-b-c,d", "a-b-c"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "name", "found"),
    [
        (TORCHRUN | {"RANK": "five"}, "RANK", "'five'"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE", "''"),
        (TORCHRUN | {"MASTER_PORT": "1.5"}, "MASTER_PORT", "'1.5'"),
        (SLURM | {"MASTER_PORT": "abc"}, "MASTER_PORT", "'abc'"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID", "'x'"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID", "none"),
    ],
)
def test_what_is_no_number_is_named(environment, name, found):
    with pytest.raises(LaunchError) as caught:
        rank_from_env(environment)
    assert name in caught.value.expected
    assert caught.value.found == found
    assert "srun, torchrun" in caught.value.hint


@pytest.mark.parametrize(
    ("environment", "expected", "found"),
    [
        (TORCHRUN | {"WORLD_SIZE": "2"}, "RANK or SLURM_PROCID must be .* below the number of ranks", "5 of 2"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "RANK or SLURM_PROCID", "5 of 0"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK or SLURM_LOCALID", "-1 of 8"),
        (SLURM | {"SLURM_PROCID": "8"}, "RANK or SLURM_PROCID", "8 of 8"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT must be a port", "65536"),
        (SLURM | {"MASTER_PORT": "0"}, "MASTER_PORT must be a port", "0"),
    ],
)
def test_a_seat_that_there_cannot_be_is_refused(environment, expected, found):
    with pytest.raises(LaunchError, match=expected) as caught:
        rank_from_env(environment)
    assert caught.value.found == found
    assert "srun, torchrun" in caught.value.hint


def test_a_free_port_is_nobodys_and_the_kernel_gives_it_to_nobody(monkeypatch):
    import socket

    assert LOCAL_PORTS.stop == FIRST_PORT
    with socket.socket() as listener:
        port = free_port()
        assert port in LOCAL_PORTS
        listener.bind(("127.0.0.1", port))
        listener.listen()
        monkeypatch.setattr(rank_info, "LOCAL_PORTS", range(port, port + 1))
        with pytest.raises(LaunchError, match="ports .* must be free .* all are in use"):
            free_port()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"])
def test_what_lightning_reads_must_be_numbers_in_every_verb(name, monkeypatch):
    monkeypatch.setenv(name, "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, ["recipe", "check", "none.yaml"])
    assert (done.exit_code, f"variable {name} must be a whole number" in done.stderr) == (LaunchError.exit_code, True)


def test_rank_and_size_that_are_both_empty_are_none():
    environment = {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "0"}
    check_rank_variables(environment)
    assert environment == {"LOCAL_RANK": "0"}
    with pytest.raises(LaunchError, match="RANK must be a whole number.*found ''"):
        check_rank_variables({"RANK": "", "WORLD_SIZE": "2"})
