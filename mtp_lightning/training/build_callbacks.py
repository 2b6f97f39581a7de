"""The callbacks of a run, in the order that they need."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from mtp_lightning.launch.signals import StopRequest
from mtp_lightning.recipe.loading.load import RecipeLike, as_recipe
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import freezes_anything
from mtp_lightning.training.health.drift import DriftMonitor, drift_section
from mtp_lightning.training.health.early_stop import EarlyStop
from mtp_lightning.training.health.rollback import Rollbacks
from mtp_lightning.training.health.stragglers import Stragglers
from mtp_lightning.training.health.watchdog import Watchdog
from mtp_lightning.training.logging.live import LiveView
from mtp_lightning.training.logging.metrics_files import MetricsFiles
from mtp_lightning.training.logging.step_profile import StepProfile
from mtp_lightning.training.logging.summary import Summary
from mtp_lightning.training.saving.init_from import Frozen, InitFrom
from mtp_lightning.training.saving.interruption import Interruption
from mtp_lightning.training.saving.save_checkpoints import Checkpoints


def build_callbacks(
    recipe: Recipe, run_folder: Path, *, layers: Mapping[str, int], stop: StopRequest | None = None
) -> list[Callback]:
    """Make all callbacks of a run.

    Rows are written before the checkpoint of their step; a stop is answered after due saves; the summary comes when
    files are written and the live view is closed. Slow ranks are looked for before anything that ranks wait in, and
    the watchdog counts a step from when all else is done.

    Args:
        recipe: the run.
        run_folder: gets metrics.csv, tensorboard/, checkpoints/, summary.json and curves.png.
        layers: layer counts by part, recorded in every checkpoint.
        stop: where signals ask the run to stop; without, only Ctrl-C does.
    """
    checkpoints = Checkpoints(recipe, run_folder / "checkpoints", layers=layers)
    return [
        *([StepProfile(recipe.debug.profile_steps, run_folder)] if recipe.debug.profile_steps else []),
        Stragglers(),
        *recipe_callbacks(recipe),
        Rollbacks(run_folder),
        MetricsFiles(recipe, run_folder),
        checkpoints,
        Interruption(checkpoints, stop or StopRequest()),
        LiveView(recipe, run_folder, checkpoints),
        Summary(recipe, run_folder, checkpoints),
        Watchdog(recipe, run_folder),
    ]


def recipe_callbacks(recipe: RecipeLike) -> list[Callback]:
    """Make the callbacks that carry out parts of a recipe, for a Trainer of the user's own.

    They load the weights of `init.path`, compare what is frozen, watch the main head and end a run early. What
    `mtp train` adds to them writes its run folder.

    Args:
        recipe: the recipe that the module is given, or its path.

    Raises:
        RecipeError: The file has faults.
    """
    recipe = as_recipe(recipe)
    return [
        *([InitFrom(recipe, Path(recipe.init.path))] if recipe.init.path else []),
        *([Frozen()] if freezes_anything(recipe) else []),
        *([DriftMonitor(recipe, drift)] if (drift := drift_section(recipe)) else []),
        *([EarlyStop(recipe.run.early_stop)] if recipe.run.early_stop else []),
    ]
