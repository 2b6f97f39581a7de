"""Loggers of a run: the real W&B and MLflow, without a network; restarts and phases go on in the same record."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from lightning.pytorch.loggers import Logger

from mtp_lightning.errors import LoggingError, RunFolderError
from mtp_lightning.recipe import Recipe, load_recipe
from mtp_lightning.recipe.schema.root import LoggingSection
from mtp_lightning.training.fit import train
from mtp_lightning.training.logging import loggers as outage
from mtp_lightning.training.logging.loggers import LoggedRun, LoggerQueue, build_loggers, hyperparameters
from tests.support import warm
from tests.support.fatal import small_file_system
from tests.support.runs import ROOT, figures, mtp, mtp_killed
from tests.training.callbacks.tiny_run import TinyModule, fit, tiny_recipe

QUICK = ("run.steps=6", "logging.every_steps=1", "run.validate_every_steps=3", "checkpoint.every_steps=2")
MLFLOW = LoggingSection(loggers=["mlflow"], project="tests")
OFFLINE = ("logging.loggers=[tensorboard,wandb,mlflow]", "logging.wandb_mode=offline", "logging.project=tests")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, cache, monkeypatch):
    """Train with all loggers; returns the run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def start(*overrides, recipe=ROOT / "recipes/debug/parallel.yaml", folder="run"):
        place = (f"run.dir={folder}", f"run.cache={cache}", "run.threads=1")
        assert train(load_recipe(recipe, [*QUICK, *OFFLINE, *place, *overrides])) == 0
        return tmp_path / folder

    return start


def wandb_records(folder, kind):
    """Read the records of one kind from every start's file, oldest first, as W&B's own tool reads them."""
    from wandb.util import get_core_path

    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.parent.stat().st_mtime)
    assert files
    lines = [line for file in files for line in inspected(get_core_path(), file, file.stat().st_mtime_ns)]
    return [line[kind] for line in lines if line["type"] == kind]


@functools.cache
def inspected(tool, file, changed_at_ns):
    """Read a file with W&B's tool, once for as long as it stays as it is."""
    command = [tool, "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def wandb_history(folder, name="train/loss_1"):
    """(W&B's step, global step, figure) of every row that has the figure."""
    items = [record["item"] for record in wandb_records(folder, "history")]
    return [(item["_step"], item["trainer/global_step"], item[name]) for item in items if name in item]


def mlflow_run(folder):
    from mlflow.tracking import MlflowClient  # takes a second

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("tests")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def mlflow_history(folder, name="train/loss_1"):
    client, found = mlflow_run(folder)
    metrics = sorted(client.get_metric_history(found.info.run_id, name), key=lambda metric: metric.timestamp)
    return [(metric.step, metric.value) for metric in metrics]


def csv_history(folder, name="train/loss_1"):
    return [(int(row["step"]), float(row[name])) for row in figures(folder / "metrics.csv") if row[name]]


@pytest.mark.slow
def test_several_loggers_at_once_get_every_row_and_a_longer_run_goes_on_in_the_same_one(run, tmp_path):
    folder = run()
    expected = csv_history(folder)
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    first = wandb_history(folder)
    assert [(step, value) for _, step, value in first] == [(k, pytest.approx(v, rel=1e-6)) for k, v in expected]
    assert mlflow_history(folder) == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert [step for _, step, _ in wandb_history(folder, "val/mean_acceptance_length")] == [3, 6]
    assert [step for step, _ in mlflow_history(folder, "val/mean_acceptance_length")] == [3, 6]
    ids = json.loads((folder / "logging.json").read_text())

    run("run.steps=8")
    again = json.loads((folder / "logging.json").read_text())
    assert (again["wandb"]["id"], again["mlflow"]) == (ids["wandb"]["id"], ids["mlflow"])
    runs = wandb_records(folder, "run")
    assert [(found["run_id"], found["resume"]) for found in runs] == [(ids["wandb"]["id"], True)] * 2
    both = wandb_history(folder)
    assert [step for _, step, _ in both] == [1, 2, 3, 4, 5, 6, 7, 8]
    own = [own for own, _, _ in both]
    assert own == sorted(set(own))  # W&B drops a row whose own step does not rise
    assert [step for step, _ in mlflow_history(folder)] == [1, 2, 3, 4, 5, 6, 7, 8]

    recipe = load_recipe(folder / "recipe.yaml").recipe
    config = [record["update"] for record in wandb_records(folder, "config")]
    assert config[-1] == hyperparameters(recipe)
    _, found = mlflow_run(folder)
    assert found.data.params.keys() == hyperparameters(recipe).keys()
    assert (found.data.params["run.steps"], found.data.tags["run.steps"]) == ("6", "8")  # a parameter never changes
    assert (found.info.status, found.info.run_name) == ("FINISHED", "debug-parallel")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # nothing beside the run folder
    metrics = {found.get("name") or found["glob_name"]: found for found in wandb_records(folder, "metric")}
    assert metrics["*"]["step_metric"] == "trainer/global_step"  # the x axis at W&B


@pytest.mark.slow
def test_a_logger_that_was_not_asked_for_writes_nothing(run):
    folder = run("logging.loggers=[wandb]")
    assert wandb_records(folder, "history")
    assert not (folder / "tensorboard").exists()
    assert not (folder / "mlflow.db").exists()


@pytest.mark.slow
def test_phases_log_into_one_run_with_rising_steps(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"extends: {ROOT}/recipes/debug/parallel.yaml\nphases: {{a: {{run: {{steps: 4}}}}, b: {{run: {{steps: 3}}}}}}\n"
    )
    folder = run(recipe=recipe, folder="phased")
    assert len({found["run_id"] for found in wandb_records(folder, "run")}) == 1
    history = wandb_history(folder)
    assert [step for _, step, _ in history] == [1, 2, 3, 4, 5, 6, 7]
    assert [own for own, _, _ in history] == sorted({own for own, _, _ in history})
    assert [number for _, _, number in wandb_history(folder, "phase")] == [1, 1, 1, 1, 2, 2, 2]
    assert mlflow_history(folder, "phase") == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 2)]
    assert mlflow_run(folder)[1].data.params["phases.b.run"] == '{"steps": 3}'
    assert not list((folder / "phases").glob("*/logging.json"))


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_runs(tmp_path, cache, monkeypatch):
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_SERVICE"):  # the latter would lend W&B's process of these tests
        monkeypatch.delenv(variable, raising=False)
    recipe, folder = str(ROOT / "recipes/debug/parallel.yaml"), tmp_path / "run"
    overrides = (*OFFLINE, "run.dir=run", f"run.cache={cache}", "run.threads=1", "run.steps=60")
    overrides += ("logging.every_steps=1", "checkpoint.every_steps=8", "run.validate_every_steps=30")
    started = ("train", recipe, *overrides)
    code = mtp_killed(*started, cwd=tmp_path, metrics=folder / "metrics.csv", after_step=20, seed=3)
    assert code == -signal.SIGKILL
    killed_after = csv_history(folder)[-1][0]
    monkeypatch.chdir(tmp_path)
    assert train(load_recipe(recipe, list(overrides))) == 0
    (run_id,) = {found["run_id"] for found in wandb_records(folder, "run")}
    assert run_id == json.loads((folder / "logging.json").read_text())["wandb"]["id"]
    history = wandb_history(folder)
    before, after = ([row for row in history if (row[0] > 60) == is_second] for is_second in (False, True))
    assert [own for own, _, _ in history] == sorted({own for own, _, _ in history})
    assert [step for _, step, _ in before] == list(range(1, len(before) + 1))  # as far as W&B had written them
    first = after[0][1]
    assert first <= killed_after + 1
    assert (first - 1) % 8 == 0  # after a checkpoint
    assert [(step, value) for _, step, value in after] == [
        (step, pytest.approx(value, rel=1e-6)) for step, value in csv_history(folder) if step >= first
    ]
    assert {step for step, _ in mlflow_history(folder)} == set(range(1, 61))
    assert mlflow_run(folder)[1].info.status == "FINISHED"


@pytest.mark.slow
def test_a_store_of_ours_that_had_no_room_is_made_anew(tmp_path, monkeypatch):
    """MLflow makes its tables one by one, and opens a store that has some of them no more."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with small_file_system(tmp_path / "disk", "700k") as disk:
        words = ("train", str(ROOT / "recipes/debug/parallel.yaml"), "run.steps=1", "logging.loggers=[mlflow]")
        words += (f"run.dir={disk}/run", f"run.cache={tmp_path}/cache", "run.validation_samples=4")
        full = mtp(*words, cwd=tmp_path)
        assert full.returncode == LoggingError.exit_code, full.stderr
        assert "disk is full" in full.stderr
        assert not list(disk.glob("run/mlflow.db*"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert mtp(*words, cwd=tmp_path).returncode == 0
        assert (disk / "run/mlflow.db").exists()


def test_a_row_that_is_trained_again_is_logged_again_at_its_step(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = tiny_recipe().model_copy(update={"logging": MLFLOW.model_copy(update={"every_steps": 1})})
    fit(tmp_path, recipe, until=5)
    (tmp_path / "checkpoints/step-00000005").rename(tmp_path / "lost")
    fit(tmp_path, recipe)
    history = mlflow_history(tmp_path)
    assert [step for step, _ in history] == [1, 2, 3, 4, 5, 5, 6]
    assert history[4] == history[5]
    assert [step for step, _ in csv_history(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert mlflow_run(tmp_path)[1].info.status == "FINISHED"


class Proxy:
    """Counts who wants to leave this machine, and lets nobody."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.callers = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            caller, _ = self.socket.accept()
            self.callers.append(caller.recv(200))
            caller.close()


@pytest.mark.slow
def test_nothing_leaves_the_machine(tmp_path, cache):
    proxy = Proxy()
    url = f"http://127.0.0.1:{proxy.socket.getsockname()[1]}"
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    environment |= {**dict.fromkeys(names, url), "NO_PROXY": "", "no_proxy": ""}
    place = ("run.dir=run", f"run.cache={cache}", "run.threads=1", "run.device=cpu")
    recipe = str(ROOT / "recipes/debug/parallel.yaml")
    done = warm.run("train", recipe, *QUICK, *OFFLINE, *place, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert proxy.callers == []
    probe = "import urllib.request as u; u.urlopen('https://example.com')"
    subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, check=False)
    assert proxy.callers  # it does count


class Fragile(Logger):
    """A logger whose server can be gone."""

    name, version = "fragile", 0

    def __init__(self):
        super().__init__()
        self.is_gone, self.rows, self.asked = False, [], 0

    def log_hyperparams(self, *_):
        """Take none."""

    def log_metrics(self, metrics, step=None):
        self.asked += 1
        if self.is_gone:
            raise ConnectionError("no route to the server")
        self.rows.append((step, metrics["x"]))


def test_rows_wait_while_a_server_is_gone_and_training_goes_on(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(outage.time, "monotonic", lambda: now)
    logger = Fragile()
    queue = LoggerQueue(logger)
    queue.send(1, {"x": 0.1})
    logger.is_gone = True
    for step in (2, 3, 4):
        queue.send(step, {"x": step / 10})
    assert logger.asked == 2  # once when it failed, not for every row
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "fragile failed: ConnectionError: no route to the server" in said
    now += outage.PAUSE_S
    logger.is_gone = False
    queue.send(5, {"x": 0.5})
    assert logger.rows == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)]
    logger.is_gone = True
    queue.send(6, {"x": 0.6})
    queue.close()
    assert "1 rows are not sent, metrics.csv has every row" in capsys.readouterr().err


def test_a_store_that_breaks_during_training_does_not_stop_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = tiny_recipe().model_copy(update={"logging": MLFLOW.model_copy(update={"every_steps": 2})})
    module = TinyModule(recipe)

    def break_store(step):
        if step == 3:
            (tmp_path / "mlflow.db").write_bytes(b"no database any more")

    module.on_step = break_store
    fit(tmp_path, recipe, module=module)
    assert [step for step, _ in csv_history(tmp_path)] == [2, 4, 6]
    said = capsys.readouterr().err
    assert "mlflow failed: " in said
    assert "rows are not sent, metrics.csv has every row" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_events_on_a_full_disk_stop_the_run_with_a_remedy(tmp_path, monkeypatch):
    told = []  # TensorBoard's thread ends with the error as well: it is told once
    monkeypatch.setattr(threading, "excepthook", told.append)
    (logger,) = build_loggers(LoggedRun(tiny_recipe(), tmp_path), tmp_path, after_step=0)
    (event_file,) = (tmp_path / "tensorboard").iterdir()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    full.replace(event_file)  # at once: the thread that writes events would make a new file

    def log():
        for step in range(1, 4):
            logger.log_metrics({"x": 1.0}, step)
            time.sleep(0.2)  # events are written by a thread

    with pytest.raises(RunFolderError, match=r"events must be written to .*tensorboard"):
        log()
    logger.finalize("failed")
    assert not told
    threading.excepthook(None)
    assert told == [None]  # errors of other threads go where they went before


def built(tmp_path, **logging):
    recipe = Recipe.model_validate({"logging": logging})
    return build_loggers(LoggedRun(recipe, tmp_path), tmp_path, after_step=0)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LoggingError) as caught:
        built(tmp_path, loggers=[name])
    assert f"pip install 'mtp_lightning[{name}]'" in caught.value.hint


def test_a_run_that_the_store_has_lost_is_refused(tmp_path):
    (tmp_path / "logging.json").write_text('{"mlflow": {"run_id": "0123456789abcdef0123456789abcdef"}}')
    with pytest.raises(LoggingError) as caught:
        built(tmp_path, loggers=["mlflow"], tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert "0123456789abcdef0123456789abcdef" in caught.value.found
    assert "remove the entry `mlflow` from logging.json" in caught.value.hint


def test_ids_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "logging.json").write_text("[1")
    with pytest.raises(LoggingError, match=r"logging\.json must be what a run has written"):
        built(tmp_path, loggers=["wandb"], wandb_mode="offline")


def test_wandb_without_a_login_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(LoggingError) as caught:
        built(tmp_path, loggers=["wandb"])
    assert "logging.wandb_mode=offline" in caught.value.hint


@pytest.mark.slow
def test_ranks_of_a_slurm_step_that_are_runs_of_their_own_log(tmp_path, cache):
    place = ("run.dir=run", f"run.cache={cache}", "run.threads=1", "logging.loggers=[tensorboard]")
    environment = os.environ | {"SLURM_PROCID": "3", "OMP_NUM_THREADS": "1"}
    recipe = str(ROOT / "recipes/debug/parallel.yaml")
    done = warm.run("train", recipe, *QUICK, *place, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
