"""What no machine can hold is told by a check and refused by training, before any of it is allocated."""

from pathlib import Path

import pytest
import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.planner.machine_memory import host_bytes, least_bytes
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from mtp_lightning.training.strategies.device import check_memory
from tests.support.runs import mtp

RECIPE = Path(__file__).parents[2] / "recipes/debug/parallel.yaml"
TOO_LARGE = ("model.vocab_size=1e9", "model.hidden_size=1000000", "model.num_hidden_layers=10000 model.head_dim=65536")


@pytest.mark.parametrize("fields", TOO_LARGE)
def test_a_model_beyond_the_machine_is_refused_before_the_run_begins(fields: str, tmp_path: Path) -> None:
    loaded = load_recipe(RECIPE, [*fields.split(), f"run.dir={tmp_path}/run", "run.device=cpu"])
    with pytest.raises(TrainingError, match=r"weights and optimizer state must fit .* GiB of them by `mtp plan`"):
        train(loaded)
    assert not (tmp_path / "run").exists()


def test_a_phase_beyond_the_machine_is_refused_too() -> None:
    fields = ["model.hidden_size=16384", "heads.kind=sequential", "data.seq_len=1024", "init.path=somewhere"]
    small, large = (load_recipe(RECIPE, [*fields, *more]).recipe for more in ([], ["phases={a: {extend_to: 1000}}"]))
    check_memory(load_recipe(RECIPE).recipe, torch.device("cpu"))
    assert least_bytes(large)[0] > 10 * least_bytes(small)[0]
    with pytest.raises(TrainingError, match="weights and optimizer state must fit"):
        check_memory(large, torch.device("cpu"))


def test_a_check_warns_of_what_no_machine_can_hold(tmp_path: Path) -> None:
    done = mtp("recipe", "check", str(RECIPE), TOO_LARGE[0], cwd=tmp_path)
    assert done.returncode == 0
    assert "715.3 GiB per rank" in done.stderr
    assert "warning" not in mtp("recipe", "check", str(RECIPE), cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("groups", "limits", "right_kib"),
    [
        ("", {}, 1000 + 24),
        ("0::/\n", {"memory.max": "max"}, 1000 + 24),
        ("0::/\n", {"memory.max": "512000"}, 500 + 24),
        ("0::/job/step\n", {"job/memory.max": "512000", "job/step/memory.max": "max"}, 500 + 24),
        ("0::/gone\n", {"memory.max": "512000"}, 500 + 24),
        ("7:cpu:/x\n3:memory:/job\n", {"memory/job/memory.limit_in_bytes": "512000"}, 500 + 24),
        ("3:memory:/job\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 1000 + 24),
    ],
)
def test_limits_of_control_groups_count(groups: str, limits: dict[str, str], right_kib: int, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nSwapTotal:  24 kB\nHugePages_Total: 0\n")
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, limit in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    assert host_bytes(tmp_path) == right_kib * 1024
