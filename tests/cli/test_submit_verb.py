"""`mtp submit`, as far as it goes without a cluster; with one: tests/slurm."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtp_lightning.cli.app import app
from mtp_lightning.errors import RunFolderError
from mtp_lightning.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/paper/13b_n4.yaml"
SMALL = ("debug.shrink=true", "strategy.num_nodes=2", "strategy.ranks_per_node=2")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def submit(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, ["submit", RECIPE, *arguments])


def pretend_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """Put a program called sbatch on PATH that keeps its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\n{text}\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "arguments"


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    result = submit(*SMALL, "--site", "local", "--dry-run", f"run.dir={tmp_path}/run", "site.time=00:03:00")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=paper-13b-n4\n")
    assert "#SBATCH --time=00:03:00\n" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_takes_less_than_a_second_and_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from mtp_lightning.cli.app import main
sys.argv = ["mtp", "submit", {RECIPE!r}, "--site", "generic-h100", "--dry-run", "run.dir=/shared/runs/x"]
try:
    main()
finally:
    assert not {{"torch", "numpy", "lightning"}} & set(sys.modules)
"""
    began_s = time.monotonic()
    used_s = os.times().children_user
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert os.times().children_user - used_s < 1, time.monotonic() - began_s


def test_a_job_that_cannot_be_noted_is_named_and_one_that_cannot_be_shown_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = pretend_sbatch(tmp_path, monkeypatch, f"mkdir {tmp_path}/run/logs/job.json; echo '17;cluster'")
    result = submit(*SMALL, "--site", "local", f"run.dir={tmp_path}/run")
    assert result.exit_code == RunFolderError.exit_code
    assert "job 17, which is submitted" in result.stderr
    assert "scancel 17" in result.stderr
    arguments.unlink()
    for place, code in (("> /dev/full", 1), ("| true", 141)):
        words = " ".join(("submit", RECIPE, *SMALL, "--site", "local", f"run.dir={tmp_path}/other"))
        command = f"set -o pipefail; {sys.executable} -m mtp_lightning {words} {place}"
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        assert subprocess.run(["bash", "-c", command], cwd=ROOT, env=buffered, capture_output=True).returncode == code
    assert not arguments.exists()


def test_a_submission_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = pretend_sbatch(tmp_path, monkeypatch, "echo '17;cluster'")
    result = submit(*SMALL, "--site", "local", "--after", "12_3", f"run.dir={tmp_path}/run")
    assert result.exit_code == 0, result.stderr
    assert "job 17" in result.stderr
    folder = tmp_path / "run/logs/submit_1"
    assert arguments.read_text() == f"--parsable --dependency=afterok:12_3 --kill-on-invalid-dep=yes {folder}/job.sh\n"
    assert (folder / "job.sh").read_text() == result.stdout
    frozen = load_recipe(folder / "recipe.yaml").recipe
    assert frozen == load_recipe(RECIPE, [*SMALL, f"run.dir={tmp_path}/run"]).recipe
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["git_revision"]) == 40
    assert environment["packages"]["pydantic"]
    assert json.loads((tmp_path / "run/logs/job.json").read_text())["job"] == "17"
    assert submit(*SMALL, "--site", "local", f"run.dir={tmp_path}/run").exit_code == 0
    assert (tmp_path / "run/logs/submit_2/job.sh").is_file()


def test_commands_come_after_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = pretend_sbatch(tmp_path, monkeypatch, "echo 18")
    commands = ("--then", "bench decode", "--then", "mtp export {run} --out '{run}/my export'")
    result = submit(*SMALL, "--site", "local", f"run.dir={tmp_path}/run", *commands)
    assert result.exit_code == 0, result.stderr
    follow = tmp_path / "run/logs/submit_1/follow.sh"
    assert arguments.read_text() == f"--parsable --dependency=afterok:18 --kill-on-invalid-dep=yes {follow}\n"
    assert follow.read_text().endswith(
        """\nfollow bench decode "$run"\nfollow export "$run" --out "$run"'/my export'\nexit "$first"\n"""
    )
    assert result.stdout == f"{(follow.parent / 'job.sh').read_text()}\n{follow.read_text()}"
    assert "job 18 runs after it: bench decode; mtp export" in " ".join(result.stderr.split())
    sweep = ("sweep", RECIPE, *SMALL, "--site", "local", "--seeds", "1,2", "--out", f"{tmp_path}/sweep", *commands)
    result = CliRunner().invoke(app, sweep)
    assert result.exit_code == 0, result.stderr
    assert "--dependency=aftercorr:18" in arguments.read_text()


def test_a_preflight_comes_first(tmp_path: Path) -> None:
    arguments = (*SMALL, "--site", "local", "--dry-run", f"run.dir={tmp_path}/run")
    assert "has_preflight=1\n" in submit(*arguments, "--preflight").stdout
    assert "has_preflight=0\n" in submit(*arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--site", "nowhere"), ["--site must be", "Known sites: generic-a100"]),
        (("--site", "local", "site.colour=red"), ["known keys only", "Valid keys: description, gpu"]),
        (("--site", "local", "--after", "$(x)"), ["--after must be the number of a job"]),
        (("--site", "local", "--dry-run", "--after", "afterok:1"), ["--after must be the number of a job"]),
        (("--site", "local", "strategy.num_nodes=0"), ["strategy.num_nodes"]),
        (("--site", "generic-h100", "strategy.ranks_per_node=16"), ["8 GPUs of a node", "ranks_per_node=8"]),
        (("--site", "local", "run.restart=true"), ["start it over"]),
        (("--site", "local", "--then", "bnech decode"), ["--then must be a command of mtp", "bnech"]),
        (("--site", "local", "--then", "bench"), ["--then must be a whole command", "decode"]),
        (("--site", "local", "--then", "export 'a"), ["written as in a shell"]),
        (("--site", "local", "--then", "generate --prompt 'a\nb'"), ["printable text on one line"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_wrong_submissions_are_refused(
    arguments: tuple[str, ...], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_sbatch(tmp_path, monkeypatch, "echo 19")
    small = SMALL if "generic-h100" not in arguments else ()
    result = submit(*small, f"run.dir={tmp_path}/run", *arguments)
    assert result.exit_code != 0
    shown = " ".join(result.stderr.split())
    assert not [word for word in words if word not in shown], shown


BIG = ("model.hidden_size=16384", "model.num_attention_heads=128", "batch.micro_batch_size=8", "strategy.num_nodes=1")


def test_what_cannot_fit_is_submitted_by_force_only(tmp_path: Path) -> None:
    arguments = ("--site", "generic-h100", "--dry-run", f"run.dir={tmp_path}/run", *BIG)
    result = submit(*arguments)
    assert result.exit_code == 6
    shown = " ".join(result.stderr.split())
    assert "must fit into the 79 GiB of an H100" in shown
    assert "--force submits all the same" in shown
    assert submit(*arguments, "--force").exit_code == 0


def test_a_folder_that_nodes_do_not_share_is_refused() -> None:
    result = submit("--site", "generic-h100", "--dry-run", "run.dir=/dev/shm/run")
    assert result.exit_code == 6
    assert "must be on a file system that they share" in " ".join(result.stderr.split())


def test_without_sbatch_one_is_told_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = submit(*SMALL, "--site", "local", "--test-only", f"run.dir={tmp_path}/run")
    assert result.exit_code == 6
    assert "sbatch must be on PATH" in result.stderr
    assert "--dry-run" in result.stderr


def test_what_slurm_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_sbatch(tmp_path, monkeypatch, "echo 'sbatch: error: invalid partition specified: train' >&2; exit 1")
    result = submit(*SMALL, "--site", "local", f"run.dir={tmp_path}/run")
    assert result.exit_code == 6
    assert "invalid partition specified: train" in result.stderr
