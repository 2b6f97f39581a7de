"""The command `mtp`. Each verb imports what it needs when it runs, so that help and recipe checks need no torch."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mtp_lightning import __version__
from mtp_lightning.cli import bench, data, doctor, eval, generate, models, plan, recipe, report, status, submit, sweep
from mtp_lightning.cli.places import expand_places
from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument, open_recipe
from mtp_lightning.console.errors import (
    end_of_lost_output,
    end_without_output,
    go_on_without_output,
    guard_output,
    print_error,
    screen,
)
from mtp_lightning.errors import LaunchError, MtpError, file_system_error
from mtp_lightning.launch.ending import code_and_words
from mtp_lightning.launch.rank_env import check_rank_variables

if TYPE_CHECKING:
    from mtp_lightning.recipe import LoadedRecipe

EPILOG = "For example: mtp train recipes/quickstart.yaml run.steps=200 run.dir=runs/mine"


class MtpGroup(TyperGroup):
    """All verbs; failures that a user can cause or cure end as a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            _check_working_folder()
            check_rank_variables(os.environ)
            return super().invoke(ctx)
        except MtpError as error:
            print_error(error)
            raise typer.Exit(error.exit_code) from error
        except OSError as refusal:
            if refusal.errno is None:  # no answer of the system
                raise
            told = file_system_error(refusal).with_traceback(refusal.__traceback__)
            print_error(told)
            raise typer.Exit(told.exit_code) from refusal
        except KeyboardInterrupt as interrupt:
            code, words = code_and_words(interrupt)
            screen(stderr=True).print(words)
            raise typer.Exit(code) from interrupt


app = typer.Typer(
    cls=MtpGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EPILOG
)
app.add_typer(data.app, name="data")
app.add_typer(recipe.app, name="recipe")
app.add_typer(bench.app, name="bench")
app.add_typer(eval.app, name="eval")
app.add_typer(report.app, name="report")


def _check_working_folder() -> None:
    """Refuse a working directory that was removed: torch's libraries end a process there with a message of their own.

    Raises:
        LaunchError: It is gone.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise LaunchError(
            "mtp must be called in a folder that is there",
            f"{os.environ.get('PWD', 'the working directory')}, which was removed",
            "Change to another folder (cd) and call it again",
        ) from None


def _print_version(*, value: bool) -> None:
    if value:
        screen().print(f"mtp {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train multi-token prediction language models."""


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    profile: Annotated[
        str | None,
        typer.Option(metavar="A-B", help="Profile steps A to B: a trace of every rank, and what costs most."),
    ] = None,
) -> None:
    """Train a recipe; given a run that was interrupted, go on where it was."""
    guard_output(go_on_without_output)
    steps = [] if profile is None else [f"debug.profile_steps=[{profile.replace('-', ',')}]"]
    changes = [*(overrides or []), *steps]
    loaded = open_recipe(recipe, changes)
    if loaded.recipe.strategy.elastic:
        from mtp_lightning.launch.local import die_with_parent
        from mtp_lightning.launch.rank_env import started_ranks

        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()  # a rank whose agent is lost would train on, unseen by the others' agents
        loaded = open_recipe(recipe, [*changes, *started_ranks(os.environ)])
    code = _train(loaded)
    if code == 0 and loaded.recipe.run.sample is not None and not _is_one_of_several():
        generate.show_sample(loaded.recipe)
    raise typer.Exit(code)


def _train(loaded: "LoadedRecipe") -> int:
    from mtp_lightning.launch.local import needs_ranks, run_ranks

    if needs_ranks(loaded.recipe, os.environ):
        return run_ranks(loaded.recipe, sys.argv[1:])
    from mtp_lightning.launch.signals import StopRequest, stop_on_signals

    with stop_on_signals(StopRequest()) as stop:  # before torch is loaded, which takes seconds
        from mtp_lightning.training.fit import train

        return train(loaded, stop)


app.command()(doctor.doctor)
app.command()(plan.plan)
app.command()(submit.preflight)
app.command()(submit.submit)
app.command()(sweep.sweep)
app.command()(status.status)
app.command("import")(models.import_model)
app.command()(models.export)
app.command()(models.extend)
app.command()(generate.generate)
expand_places(app)


def main() -> None:
    """Run the command line."""
    guard_output(end_without_output)
    try:
        _run()
    except SystemExit as end:
        if not _is_one_of_several():
            raise
        _leave(end)


def _run() -> None:
    """Run a verb, and write out all that it has printed while a failure to do so can still be answered."""
    try:
        app()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        if not end.code:
            end_of_lost_output()
        raise


def _is_one_of_several() -> bool:
    from mtp_lightning.launch.rank_env import rank_from_env

    try:
        return rank_from_env(os.environ) is not None
    except MtpError:  # told by those verbs to which it matters
        return False


def _leave(end: SystemExit) -> NoReturn:
    """End one of several ranks without taking the interpreter down first.

    Threads of gloo (torch 2.13) may still free tensors then, which aborts a run that has ended well with code 134. Can
    go when `destroy_process_group` waits for them.
    """
    os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
