"""The one way into training: from a recipe to a finished run, or on from where it was."""

import gc
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from mtp_lightning.checkpoint.format.folder import CheckpointFolder
from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.errors import MtpError
from mtp_lightning.launch.signals import INTERRUPTED, REQUEUE, StopRequest
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import LoadedRecipe, Recipe, num_head_layers, num_trunk_layers
from mtp_lightning.training.build_callbacks import build_callbacks
from mtp_lightning.training.health.bad_node import as_hardware_error, as_loader_error
from mtp_lightning.training.health.early_stop import is_over
from mtp_lightning.training.health.rollback import roll_back
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.logging.log_routing import redirect_library_logs
from mtp_lightning.training.logging.loggers import LoggedRun, build_loggers
from mtp_lightning.training.logging.summary import complete_ending
from mtp_lightning.training.phases import train_phases
from mtp_lightning.training.run_folder import Opened, opened_run_folder
from mtp_lightning.training.step.skipped_steps import NonFiniteStreak
from mtp_lightning.training.strategies.deterministic import deterministic_kernels
from mtp_lightning.training.strategies.device import check_memory, prepare_device
from mtp_lightning.training.strategies.process_group import process_group
from mtp_lightning.training.strategies.zero import build_strategy

MOST_PASSES = 4  # two have always been enough


def train(loaded: LoadedRecipe, stop: StopRequest | None = None) -> int:
    """Train a recipe to its end; a run folder that has a checkpoint is continued. Returns the exit code.

    Args:
        loaded: the recipe.
        stop: where signals ask to stop; whoever makes it handles them (`stop_on_signals`).
    """
    recipe, stop = loaded.recipe, stop or StopRequest()
    with deterministic_kernels(recipe):
        check_memory(recipe, prepare_device(recipe))
        with process_group(recipe):
            if recipe.phases:
                return train_phases(recipe, partial(_train_run, stop=stop))
            return _train_run(recipe, LoggedRun(recipe, Path(recipe.run.dir)), stop)


def _train_run(recipe: Recipe, logged: LoggedRun, stop: StopRequest) -> int:
    """Train a recipe without phases, or one phase."""
    with opened_run_folder(recipe, Ranks()) as opened:
        recipe = opened.recipe
        if opened.checkpoint is not None and is_over(recipe, opened.checkpoint):
            _end(opened, recipe, opened.checkpoint)
            return 0
        return _fit_with_rollbacks(recipe, opened, logged, stop)


def _fit_with_rollbacks(recipe: Recipe, opened: Opened, logged: LoggedRun, stop: StopRequest) -> int:
    """Train to the end; where too many steps in a row are not finite, go back and on without their rows."""
    while True:
        code: int | None = None
        try:
            code = _fit(recipe, opened, logged, stop)
        except NonFiniteStreak as streak:
            checkpoint = roll_back(opened.path, recipe.health.nonfinite, streak)
            opened = replace(opened, checkpoint=checkpoint)
        _let_go()
        if code is not None:
            return code


def _let_go() -> None:
    """Free what a fit has held; its model and optimizer know each other, so they wait for the collector.

    Now and then one pass leaves the engine: what it frees was held by C++ objects, whose own references it cannot see.
    """
    for _ in range(MOST_PASSES):
        if gc.collect() == 0:
            break
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _end(opened: Opened, recipe: Recipe, checkpoint: CheckpointFolder) -> None:
    """Say that a run is finished, and write what it could not write when it ended."""
    with Ranks().raise_on_all_ranks():
        if not Ranks().is_first:
            return
        complete_ending(recipe, opened.path, checkpoint)
        say(
            f"{opened.path} is finished: {checkpoint.step} of {recipe.run.steps} steps. Raise "
            f"{'run.steps' if checkpoint.step >= recipe.run.steps else 'run.early_stop.validations'} to go on, "
            "or start over with run.restart=true.",
        )


def _fit(recipe: Recipe, opened: Opened, logged: LoggedRun, stop: StopRequest) -> int:
    L.seed_everything(recipe.run.seed, verbose=False)
    checkpoint = opened.checkpoint
    if checkpoint is not None and Ranks().is_first:
        say(f"Continuing {opened.path} after step {checkpoint.step} of {recipe.run.steps}")
    with redirect_library_logs(opened.attempt / "lightning.log"):
        trainer = build_trainer(recipe, opened.path, stop, _loggers(opened, logged))
        module, data = MtpLightningModule(recipe), MtpDataModule(recipe)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint.path if checkpoint else None)
        except (KeyboardInterrupt, SystemExit):  # Lightning 2.6 turns the first into the second
            if Ranks().size > 1 and not stop.exit_code:
                raise  # this rank leaves alone (Ctrl-C on one node, say): nobody must wait for the others
            return _stopped(opened, stop.exit_code or INTERRUPTED)
        except MtpError:
            raise
        except Exception as error:
            broken = as_hardware_error(error, opened.path) or as_loader_error(error)
            if broken is not None:
                raise broken from error
            if not stop.exit_code:
                raise
            traceback.print_exc()  # another rank has gone while this one waited for it: there is nobody to wait for
            raise SystemExit(stop.exit_code) from None
    return 0


def _loggers(opened: Opened, logged: LoggedRun) -> list[Logger]:
    """Open the run's loggers on the first rank; where that fails, all ranks do."""
    # not what Lightning makes of Slurm's variables
    rank_zero_only.rank = Ranks().rank  # type: ignore[attr-defined]
    loggers: list[Logger] = []
    with Ranks().raise_on_all_ranks():
        if Ranks().is_first:
            after_step = opened.checkpoint.step if opened.checkpoint else 0
            loggers = build_loggers(logged, opened.path, after_step=after_step)
    return loggers


def _stopped(opened: Opened, exit_code: int) -> int:
    if Ranks().is_first:
        what = "Stopped, to be requeued" if exit_code == REQUEUE else "Interrupted"
        say(f"{what}. The same command goes on: mtp train {opened.path}")
    return exit_code


class _NoSignals(_SignalConnector):
    """Lightning 2.6 broadcasts to all ranks inside its handler of SIGTERM, which deadlocks if they are elsewhere.

    Can go when its handlers no longer communicate.
    """

    def register_signal_handlers(self) -> None:
        """Leave signals to `launch.stopping`."""


def build_trainer(
    recipe: Recipe, run_folder: Path, stop: StopRequest | None = None, loggers: Sequence[Logger] = ()
) -> L.Trainer:
    """Build the Lightning trainer of a run; everything that Lightning prints, saves or signals by itself is off."""
    device = prepare_device(recipe)
    layers = {"trunk": num_trunk_layers(recipe), "heads": num_head_layers(recipe)}
    trainer = L.Trainer(
        accelerator=device.type,
        devices=1,  # of this rank; the strategy knows which, and of the others
        num_nodes=recipe.strategy.num_nodes,
        strategy=build_strategy(recipe, device),
        precision="32-true",  # run.precision is the module's business on one device, and DeepSpeed's under ZeRO
        max_steps=recipe.run.steps,
        max_epochs=-1,
        val_check_interval=recipe.run.validate_every_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=build_callbacks(recipe, run_folder, layers=layers, stop=stop),
        # not what Lightning makes of Slurm's variables: one rank of a job is a run of its own
        plugins=[LightningEnvironment()] if recipe.strategy.kind == "single" else None,
        use_distributed_sampler=False,
        inference_mode=False,
        logger=list(loggers),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_folder,
    )
    trainer._signal_connector = _NoSignals(trainer)
    return trainer
