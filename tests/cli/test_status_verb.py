"""`mtp status`: runs at a glance."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtp_lightning.cli.app import app
from mtp_lightning.console.errors import BROKEN_PIPE
from mtp_lightning.launch.status import RunStatus, find_runs, statuses
from mtp_lightning.recipe import Recipe, recipe_to_yaml


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"].split(":")[0])  # no Slurm


def status(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, ["status", *map(str, arguments)])


def make_run(
    folder: Path, *, attempts: int = 1, rows: str = "", saved: tuple[int, ...] = (), ramp: object = None
) -> Path:
    batch = {"global_batch_size": 10, "micro_batch_size": 5, "ramp": ramp}
    content = {"name": "mine", "run": {"steps": 100, "dir": str(folder)}, "batch": batch, "data": {"seq_len": 10}}
    recipe = Recipe.model_validate(content)
    for attempt in range(1, attempts + 1):
        (folder / f"logs/attempt_{attempt}").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    (folder / "metrics.csv").write_text(
        f"step,tokens,train/loss_1,tokens_per_s,val/loss_1,val/mean_acceptance_length\n{rows}"
    )
    for step in saved:
        (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    return folder


ROWS = "10,1000,3.5,50,,\n20,2000,3.0,100,3.25,1.75\n30,3000,2.75,200,,\n40,4000,2.5,210,,"


def only(folder: Path) -> RunStatus:
    [found] = statuses([folder])
    return found


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "a", attempts=3, rows=ROWS, saved=(10, 20))
    (tmp_path / "a/checkpoints/step-00000030.partial").mkdir()
    found = only(tmp_path)
    assert (found.step, found.steps, found.tokens, found.tokens_per_s) == (30, 100, 3000, 200)  # half a row: none
    assert (found.loss, found.mean_acceptance_length, found.checkpoint, found.restarts) == (3.25, 1.75, 20, 2)
    assert (found.state, found.job, found.remaining_s) == ("stopped", None, None)


def test_a_run_that_holds_its_lock_is_running(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=ROWS)
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = only(run)
        assert found.state == "running"
        assert found.remaining_s == 70 * 100 / 200
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # looking has not disturbed it
    assert only(run).state == "stopped"


def test_steps_of_a_ramp_take_the_longer_the_larger_they_are(tmp_path: Path) -> None:
    ramp = {
        "from_batch_size": 5,
        "over_samples": 200,
    }  # rows of 40 steps; at step 30 there are 10 more such steps, then 60
    run = make_run(tmp_path, rows=ROWS, ramp=ramp)
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert only(run).remaining_s == (10 * 50 + 60 * 100) / 200


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    make_run(tmp_path, rows="100,9000,3,50,3,2\n", saved=(100,))
    (tmp_path / "summary.json").write_text(json.dumps({"is_finished": True}))
    assert only(tmp_path).state == "finished"


def test_a_submitted_run_that_has_not_begun_is_there(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/job.json").write_text('{"job": "12_1"}')
    found = only(tmp_path)
    assert (found.job, found.step, found.checkpoint) == ("12_1", 0, None)


def test_slurm_knows_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        make_run(tmp_path / name, rows=ROWS)
        (tmp_path / name / "logs/job.json").write_text(json.dumps({"job": f"7_{name == 'b':d}"}))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\necho '7_0 RUNNING'\necho '7_1 PENDING'\n")
    (tmp_path / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    assert [found.state for found in statuses([tmp_path])] == ["RUNNING", "PENDING", "RUNNING"]


def test_damaged_files_cost_figures_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows="\x00\xff,,\n1,2\nx,y,z,a,b,c\n")
    (run / "recipe.yaml").write_text("a: [")
    (run / "summary.json").write_text("{")
    found = only(run)
    assert (found.name, found.step, found.tokens, found.loss) == ("?", 0, None, None)


DEEP = b"a: " + b"[" * 20_000
ODD = {
    "UTF-16": ("recipe.yaml", "name: x\n".encode("utf-16"), "recipe.yaml: bytes that are not UTF-8 text"),
    "null": ("recipe.yaml", b"run: null\n", "recipe.yaml: run is null, not a section"),
    "steps": ("recipe.yaml", b"name: mine\nrun: {steps: many}\n", "run.steps is 'many', not a number of steps"),
    "long": ("recipe.yaml", b"run: {steps: " + b"9" * 5000 + b"}\n", "no YAML (a number of 5000 characters, line 1)"),
    "hex": ("recipe.yaml", b"run: {steps: 0x" + b"f" * 5000 + b"}\n", "a number of 5002 characters"),
    "name": ("recipe.yaml", b"name: [[1]]\n", "recipe.yaml: name is a list, not text"),
    "deep": ("recipe.yaml", DEEP, "recipe.yaml: no YAML (brackets nested without end"),
    "list": ("recipe.yaml", b"- 1\n", "recipe.yaml: a list in place of sections"),
    "tag": ("recipe.yaml", b"name: !!python/object:os.system x\n", "recipe.yaml: no YAML"),
    "value": ("recipe.yaml", b"name: !!bool x\n", "the tag !!bool"),
    "brace": ("summary.json", b"{", "summary.json: no JSON"),
    "array": ("summary.json", b"[]", "summary.json: a list in place of an object"),
    "number": ("summary.json", b'{"a": ' + b"9" * 5000 + b"}", "summary.json: a number of too many digits"),
    "nest": ("summary.json", b'{"a": ' * 100_000, "summary.json: brackets nested too deep"),
    "job": ("logs/job.json", b'{"job": "1 --states=x"}', "logs/job.json: job is '1 --states=x', not the number"),
    "bytes": ("logs/job.json", b"\xff", "logs/job.json: bytes that are not UTF-8 text"),
    "empty": ("summary.json", b"{}", None),
    "huge": ("metrics.csv", b"step,tokens,tokens_per_s\n1e300,1e300,1e-320\n", None),
    "quotes": ("metrics.csv", b'step,"\r,x\n1,"2,3\n', None),
    "ramp": (
        "recipe.yaml",
        b"batch: {global_batch_size: 1000000000, ramp: {from_batch_size: 1}}\nrun: {steps: 9}\n",
        None,
    ),
}


@pytest.mark.timeout(60)
def test_odd_runs_hide_no_others(tmp_path: Path) -> None:
    for name, (file, content, _) in ODD.items():
        path = make_run(tmp_path / f"odd/{name}", rows=ROWS) / file
        path.write_bytes(content)
    for name in ("recipe.yaml", "summary.json", "metrics.csv", "logs/job.json"):
        path = make_run(tmp_path / f"odd/fifo-{name.replace('/', '-')}") / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    (make_run(tmp_path / "odd/folder") / "summary.json").mkdir()
    (make_run(tmp_path / "odd/phase") / "phases/odd").mkdir(parents=True)
    (tmp_path / "odd/phase/phases/odd/recipe.yaml").write_text("name: x\n")
    make_run(tmp_path / "sound", rows=ROWS, saved=(20,))
    result = status(tmp_path)
    assert result.exit_code == 0, result.exception
    table, _, faults = result.stdout.partition(f"\n{tmp_path}/odd/UTF-16: ")
    rows = {line.split()[0].removeprefix(f"{tmp_path}/") for line in table.splitlines() if line.startswith("/")}
    assert {"sound", *(f"odd/{name}" for name in ODD), "odd/fifo-recipe.yaml", "odd/folder", "odd/phase"} <= rows
    assert "30/100" in next(line for line in table.splitlines() if "/sound" in line)
    lines = result.stdout.splitlines()
    for name, (_, _, found) in ODD.items():
        own = [line for line in lines if line.startswith(f"{tmp_path}/odd/{name}: ")]
        assert len(own) == (found is not None), name
        assert found is None or found in own[0]
    assert sum("a FIFO or a device" in line for line in lines) == 5
    assert f"{tmp_path}/sound: " not in faults


def test_a_folder_that_cannot_be_looked_into_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "sound", rows=ROWS)
    (tmp_path / "closed").mkdir(mode=0o000)
    list_folder = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:  # root may look into everything
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return list_folder(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    result = status(tmp_path)
    assert result.exit_code == 0, result.exception
    assert f"{tmp_path}/closed: cannot be looked into: permission denied" in result.stdout.splitlines()
    assert [found.state for found in statuses([tmp_path])] == ["unreadable", "stopped"]
    assert "has 300 bytes, and a file system takes 255" in " ".join(status("x" * 300).stderr.split())


def test_names_of_others_do_not_write_on_the_screen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a\x1b[2J\u202eb")
    (run / "recipe.yaml").write_text('name: "x\\e]0;t\\a\\r\\x9b\\ny"\nrun: 7\n')
    result = status(tmp_path)
    assert result.exit_code == 0, result.exception
    assert not [letter for letter in result.stdout if letter != "\n" and not letter.isprintable()]
    assert r"a\x1b[2J\u202eb" in result.stdout
    assert r"x\x1b]0;t\x07\r\x9b\ny" in result.stdout
    assert len([line for line in result.stdout.splitlines() if "/a" in line]) == 2


def test_the_table_shows_every_run(tmp_path: Path) -> None:
    make_run(tmp_path / "one", rows=ROWS, saved=(20,))
    make_run(tmp_path / "deep/er/two")
    text = status(tmp_path).stdout
    [line] = [line for line in text.splitlines() if "one" in line]
    assert line.split() == [
        str(tmp_path / "one"),
        "mine",
        "-",
        "stopped",
        "30/100",
        "3k",
        "200",
        "3.250",
        "1.75",
        "20",
        "0",
        "-",
    ]
    assert "two" in text
    assert list(find_runs(tmp_path / "one")) == [tmp_path / "one"]


def test_no_runs_is_said(tmp_path: Path) -> None:
    result = status(tmp_path)
    assert result.exit_code == 4
    assert "mtp status DIR" in result.stderr


def test_it_takes_less_than_a_second_and_no_torch(tmp_path: Path) -> None:
    for k in range(20):
        make_run(tmp_path / f"{k}", rows="".join(f"{k},{k},1,1,1,1\n" for k in range(5000)))
    code = f"""
import sys
from mtp_lightning.cli.app import main
sys.argv = ["mtp", "status", {str(tmp_path)!r}]
try:
    main()
finally:
    assert not {{"torch", "numpy", "lightning"}} & set(sys.modules)
"""
    used_s = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert os.times().children_user - used_s < 1
    assert len(done.stdout.splitlines()) == 22


def test_watching_in_a_pipe_shows_every_look_and_ends_with_its_reader(tmp_path: Path) -> None:
    make_run(tmp_path / "a", rows=ROWS)
    command = [sys.executable, "-m", "mtp_lightning", "status", str(tmp_path), "--watch", "--every", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        lines = [watching.stdout.readline() for _ in range(5)]
        watching.stdout.close()
        assert watching.wait(30) == BROKEN_PIPE
    assert sum("checkpoint" in line for line in lines) == 2
