"""Lightning's loggers of a run: TensorBoard, Weights & Biases, MLflow; every restart goes on in the same record.

metrics.csv is written by `MetricsFiles`, which hands every row to these as well. Ids are kept in logging.json.

W&B and MLflow cannot take rows back: what is trained again after a restart is logged again, at the same
`trainer/global_step` (W&B's x axis) or step (MLflow). W&B also refuses a step of its own that does not rise, so every
start begins where no earlier one can have come to. TensorBoard drops the rows that are trained again. The last rows
before a SIGKILL can be missing at W&B (0.31), whose process of its own had not written them; metrics.csv has them.
"""

import contextlib
import importlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from mtp_lightning.console.progress import say
from mtp_lightning.errors import LoggingError, MtpError, RunFolderError, refusal_of
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.files.untrusted import read_json
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.diff import leaves

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run


PAUSE_S = 300.0
KEPT = "metrics.csv has every row"


@contextlib.contextmanager
def outage_reported(name: str, then: str = KEPT) -> Iterator[None]:
    """Report on stderr what fails in the body, unless it must stop the run (`MtpError`)."""
    try:
        yield
    except MtpError:
        raise
    except Exception as error:  # each library has exceptions of its own, and of those below it
        with contextlib.suppress(OSError):  # the disk of stderr may be what is full
            say(f"{name} failed: {type(error).__name__}: {error}; {then}", stderr=True)


@final
class LoggerQueue:
    """Rows on their way to a logger; while it fails they wait, and it is asked again every five minutes."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._rows: list[tuple[int, Mapping[str, float]]] = []
        self._rests_until = 0.0
        self._name = type(logger).__name__.strip("_").lower()

    def send(self, step: int, row: Mapping[str, float]) -> None:
        """Log a row, and those that wait before it."""
        self._rows.append((step, row))
        if time.monotonic() >= self._rests_until:
            self._flush(f"training goes on, its rows are sent later, {KEPT}")

    def close(self) -> None:
        """Try the rows that wait for the last time."""
        if self._rows:
            self._flush(f"{len(self._rows)} rows are not sent, {KEPT}")
            self._rows = []

    def _flush(self, then: str) -> None:
        self._rests_until = time.monotonic() + PAUSE_S
        with outage_reported(self._name, then):
            while self._rows:
                step, row = self._rows[0]
                self._logger.log_metrics(dict(row), step)
                self._rows.pop(0)
            self._rests_until = 0.0


RECORDS = "logging.json"
DEFAULTS = {
    "WANDB_ERROR_REPORTING": "false",  # crash reports to W&B's makers
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # training waits meanwhile; rows that fail are sent later
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Environment variables that are set unless the user has set them, before a library reads them."""
FINISH_TIMEOUT_S = 60.0
HPARAMS_METRICS = ("val/loss_1", "val/mean_acceptance_length")
NO_MLFLOW_KEY = re.compile(r"[^\w./ -]")


@final
@dataclass(frozen=True)
class LoggedRun:
    """One run as loggers know it; all phases of a recipe log into the same one."""

    recipe: Recipe  # of the whole run
    folder: Path
    phase: int | None = None  # number of the phase that is trained, from 1
    first_step: int = 0  # steps of the phases before

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        phases = self.recipe.phases.values()
        return sum(phase.run.get("steps", self.recipe.run.steps) for phase in phases) or self.recipe.run.steps

    def metrics(self, row: Mapping[str, float]) -> dict[str, float]:
        """Add the phase, if there are any."""
        return {**row, "phase": self.phase} if self.phase else dict(row)


def build_loggers(run: LoggedRun, run_folder: Path, *, after_step: int) -> list[Logger]:
    """Open the loggers that a recipe asks for; on the first rank only.

    Args:
        run: what is logged.
        run_folder: folder of this run, or of the phase.
        after_step: step of the checkpoint that the run goes on from, or 0.

    Raises:
        LoggingError: A library is missing, or its server or store does not do what is asked.
    """
    openers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: _TensorBoard(run_folder, after_step),
        "wandb": lambda: _open_wandb(run),
        "mlflow": lambda: _open_mlflow(run),
    }
    names = [name for name in openers if name in run.recipe.logging.loggers]
    loggers = [_opened(name, openers[name]) for name in names]
    for name, logger in zip(names, loggers, strict=True):
        _opened(name, lambda logger=logger: logger.log_hyperparams(hyperparameters(run.recipe)))  # type: ignore[misc]
    return loggers


def hyperparameters(recipe: Recipe) -> dict[str, Any]:
    """Flatten a resolved recipe: numbers and texts as they are, all else as JSON.

    >>> values = hyperparameters(Recipe())
    >>> values["heads.num_offsets"], values["optimizer.betas"], values["init.path"]
    (4, '[0.9, 0.95]', 'null')
    """
    plain = (str, int, float)
    return {path: leaf if isinstance(leaf, plain) else json.dumps(leaf) for path, leaf in leaves(recipe).items()}


def _opened(name: str, open_it: Callable[[], Any]) -> Any:
    """Call a library, whose failure becomes an error of ours."""
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    try:
        if name != "tensorboard":
            importlib.import_module(name)
        return open_it()
    except MtpError:
        raise
    except ImportError as error:
        raise LoggingError(
            f"the libraries that logging to {name} needs must be installed",
            str(error),
            f"Install them: pip install 'mtp_lightning[{name}]', or leave {name} out of logging.loggers.",
        ) from error
    except Exception as error:  # each library has exceptions of its own, and of those below it
        found = refusal_of(error) if isinstance(error, OSError) else str(error)
        raise LoggingError(
            f"{name} must be ready to log to", f"{type(error).__name__}: {found}", REMEDIES[name]
        ) from error


REMEDIES = {
    "tensorboard": "Make room or repair access, or leave tensorboard out of logging.loggers.",
    "wandb": "Log in (`wandb login`, or WANDB_API_KEY), log without a network by logging.wandb_mode=offline, or leave "
    "wandb out of logging.loggers.",
    "mlflow": "Make room, correct logging.tracking_uri or start its server; where the store has lost this run, remove "
    f"the entry `mlflow` from {RECORDS} of the run folder; or leave mlflow out of logging.loggers.",
}


@final
class _TensorBoard(TensorBoardLogger):
    """Events in the run folder, each on disk as soon as it is logged."""

    def __init__(self, run_folder: Path, after_step: int) -> None:
        folder = run_folder / "tensorboard"
        is_continued = _events_date_from_before_now(folder)
        purge_step = after_step + 1 if is_continued else None  # hides events of steps that are trained again
        super().__init__(run_folder, name="", version=folder.name, default_hp_metric=False, purge_step=purge_step)
        self._told, threading.excepthook = threading.excepthook, self._tell
        _ = self.experiment

    def _tell(self, failure: threading.ExceptHookArgs) -> None:
        """Print what ends a thread, unless it is TensorBoard's at a full disk, which `log_metrics` raises."""
        if type(failure.thread).__name__ != "_AsyncWriterThread" or not isinstance(failure.exc_value, OSError):
            self._told(failure)

    def log_hyperparams(self, params: Any, *_: Any) -> None:
        """Name them beside the run's last figures; Lightning's own would log a first value of those."""
        from torch.utils.tensorboard.summary import hparams

        summaries = hparams(params, dict.fromkeys(HPARAMS_METRICS, 0.0))  # type: ignore[no-untyped-call]
        for summary in summaries:
            self.experiment._get_file_writer().add_summary(summary)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write events.

        Raises:
            RunFolderError: They cannot be written.
        """
        try:
            for name, value in metrics.items():  # Lightning's own calls a full disk a metric of the wrong type
                self.experiment.add_scalar(name, value, step)
            self.experiment.flush()
        except OSError as error:
            raise RunFolderError(
                f"events must be written to {self.log_dir}",
                refusal_of(error, Path(self.log_dir)),
                "Make room or repair access, then run the same command again",
            ) from error

    def save(self) -> None:
        """Do nothing: Lightning would write hyperparameters that recipe.yaml has."""

    def finalize(self, status: str) -> None:
        """Close the file; an event that could not be written has been reported."""
        threading.excepthook = self._told
        with contextlib.suppress(OSError):
            self.experiment.close()


def _events_date_from_before_now(folder: Path) -> bool:
    """Give earlier attempts' files names that sort before a new one's, and say whether there are any.

    TensorBoard reads files in the order of their names, which begin with the second of their making and go on with
    host, process and a count. Attempts of the same second, or on a node whose clock is behind the last one's, would be
    read in another order than they were written in, and the wrong one's events would be hidden.
    """
    pattern = re.compile(r"(events\.out\.tfevents\.)(\d{10})(\..+)")
    found = [named for path in folder.glob("events.*") if (named := pattern.fullmatch(path.name))]
    second = int(time.time())
    for named in sorted(found, key=lambda named: named[0], reverse=True):
        second = min(second - 1, int(named[2]))
        if second < int(named[2]):
            (folder / named[0]).rename(folder / f"{named[1]}{second:010d}{named[3]}")
    return bool(found)


@final
class _Wandb(WandbLogger):
    """A run of Weights & Biases."""

    def __init__(self, run: LoggedRun, experiment: "Run", offset: int) -> None:
        super().__init__(experiment=experiment, project=run.recipe.logging.project, save_dir=run.folder)
        self._run, self._offset = run, offset

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row."""
        global_step = self._run.first_step + (step or 0)
        row = {**self._run.metrics(metrics), "trainer/global_step": global_step}
        self.experiment.log(row, step=self._offset + global_step, commit=True)

    def finalize(self, status: str) -> None:
        """Finish the run until it is resumed."""
        with outage_reported("wandb"):
            self.experiment.finish(exit_code=int(status != "success"))


def _open_wandb(run: LoggedRun) -> Logger:
    import wandb

    section, record = run.recipe.logging, _read_records(run.folder).get("wandb", {})
    run_id, offset = record.get("id") or secrets.token_hex(4), record.get("last_step", 0)
    _keep_record(run.folder, "wandb", {"id": run_id, "last_step": offset + run.steps})
    experiment = wandb.init(
        dir=run.folder.absolute(),  # W&B writes from a process of its own, whose working directory may be another
        id=run_id,
        resume="allow",
        reinit="finish_previous",
        project=section.project,
        entity=section.entity,
        name=run.recipe.name,
        group=section.group,
        tags=section.tags,
        mode=section.wandb_mode,
        settings=wandb.Settings(console="off", quiet=True, finish_timeout=FINISH_TIMEOUT_S),
    )
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return _Wandb(run, experiment, offset)


@final
class _MLflow(MLFlowLogger):
    """A run of MLflow."""

    def __init__(self, run: LoggedRun, uri: str, run_id: str | None) -> None:
        section = run.recipe.logging
        tags = {**dict.fromkeys(section.tags, "true"), **({"group": section.group} if section.group else {})}
        is_local = not uri.startswith("http")
        artifacts = str(run.folder.absolute() / "mlflow_artifacts") if is_local else None
        super().__init__(
            section.project, run.recipe.name, tracking_uri=uri, tags=tags, artifact_location=artifacts, run_id=run_id
        )
        self._run = run

    def log_hyperparams(self, params: Any) -> None:
        """Log them once; MLflow never changes a parameter, so one that has changed on the way becomes a tag."""
        params = {NO_MLFLOW_KEY.sub("_", name): str(value)[:250] for name, value in params.items()}
        known = self.experiment.get_run(self.run_id).data.params
        super().log_hyperparams({name: value for name, value in params.items() if name not in known})
        for name in (name for name, value in known.items() if params.get(name, value) != value):
            self.experiment.set_tag(self.run_id, name, params[name])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row; in names, what MLflow does not take becomes a dot."""
        row = {NO_MLFLOW_KEY.sub(".", name): value for name, value in self._run.metrics(metrics).items()}
        super().log_metrics(row, self._run.first_step + (step or 0))

    def finalize(self, status: str = "success") -> None:
        """Set the run's state."""
        with outage_reported("mlflow"):
            super().finalize(status)


def _open_mlflow(run: LoggedRun) -> Logger:
    store = run.folder.absolute() / "mlflow.db"
    uri = run.recipe.logging.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store}"
    with _removed_if_new(store):
        logger = _MLflow(run, uri, _read_records(run.folder).get("mlflow", {}).get("run_id"))
        run_id = logger.run_id
        logger.experiment.update_run(run_id, status="RUNNING")
    _keep_record(run.folder, "mlflow", {"run_id": run_id})
    return logger


@contextlib.contextmanager
def _removed_if_new(store: Path) -> Iterator[None]:
    """Remove a store that is half made when the body raises, as on a full disk: later starts could not open it."""
    is_new = not store.exists()
    try:
        yield
    except BaseException:
        for path in store.parent.glob(f"{store.name}*") if is_new else ():
            path.unlink(missing_ok=True)
        raise


def _read_records(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RECORDS
    try:
        records: dict[str, dict[str, Any]] = read_json(path)
        return {name: dict(record) for name, record in records.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LoggingError(
            f"{path} must be what a run has written",
            str(error),
            "Remove it; the loggers then begin new runs.",
        ) from error


def _keep_record(folder: Path, name: str, record: dict[str, Any]) -> None:
    records = _read_records(folder) | {name: record}
    replace_durably(folder / RECORDS, json.dumps(records, indent=2).encode() + b"\n")
