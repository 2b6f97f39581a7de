"""A run in phases: one run after the other inside one run folder, begun, interrupted and resumed as a whole."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtp_lightning.checkpoint.format.folder import newest_complete
from mtp_lightning.console.progress import say
from mtp_lightning.errors import RunFolderError
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.files.untrusted import OddFileError, read_object, reason_of
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.loading.phases import Phase, phases_of
from mtp_lightning.training.draft_vocabulary import with_draft_vocabulary
from mtp_lightning.training.health.early_stop import is_over
from mtp_lightning.training.logging.loggers import LoggedRun
from mtp_lightning.training.logging.summary import complete_ending
from mtp_lightning.training.run_folder import check_changes, opened_run_folder


def train_phases(recipe: Recipe, train_one: Callable[[Recipe, LoggedRun], int]) -> int:
    """Train every phase that is not finished, in order; returns the exit code of the first that does not end well.

    Args:
        recipe: a recipe with phases.
        train_one: trains one phase to its end, or on from where it was.

    Raises:
        RunFolderError: A finished phase was trained with other settings than the recipe gives it now.
    """
    phases, is_first = phases_of(recipe), Ranks().is_first
    first_steps = [0, *itertools.accumulate(phase.recipe.run.steps for phase in phases)]
    with opened_run_folder(recipe, Ranks()) as opened:
        for phase in phases:
            is_finished = False
            with Ranks().raise_on_all_ranks():
                if is_first:
                    is_finished = _is_finished(phase)
            if Ranks().broadcast(is_finished):
                continue
            if is_first:
                say(f"Phase {phase.number} of {len(phases)}: {phase.name}")
            logged = LoggedRun(recipe, opened.path, phase.number, first_steps[phase.number - 1])
            if code := train_one(phase.recipe, logged):
                return code
        if is_first:
            _summarise(opened.path, phases)
    return 0


def _is_finished(phase: Phase) -> bool:
    """Tell whether a phase has ended; what it could not write when it ended is written."""
    folder = Path(phase.recipe.run.dir)
    newest = newest_complete(folder / "checkpoints")
    if newest is None or not is_over(phase.recipe, newest):
        return False
    recipe = with_draft_vocabulary(phase.recipe, folder / "recipe.yaml")
    check_changes(folder, recipe)
    complete_ending(recipe, folder, newest)
    return True


def _summarise(folder: Path, phases: tuple[Phase, ...]) -> None:
    """Write the summaries of all phases into one file, by the phase's name."""
    summaries = {phase.name: _summary_of(Path(phase.recipe.run.dir)) for phase in phases}
    content = {"is_finished": True, "phases": summaries}
    replace_durably(folder / "summary.json", json.dumps(content, indent=2).encode() + b"\n")
    say(f"All {len(phases)} phases are finished: {folder}/summary.json")


def _summary_of(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        return read_object(path)
    except (OSError, OddFileError) as error:
        raise RunFolderError(
            "a phase that has ended must have its summary.json",
            f"{reason_of(error)}, in {path}",
            "Remove summary.json and the last checkpoint of that phase, and run the same command again",
        ) from error
