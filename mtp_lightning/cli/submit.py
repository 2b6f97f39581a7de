"""`mtp submit` and `mtp preflight`, and how `mtp sweep` hands its runs to Slurm."""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument, open_recipe
from mtp_lightning.console.errors import screen

if TYPE_CHECKING:
    from mtp_lightning.recipe import Recipe


def preflight(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Check on the nodes themselves that a recipe will run: versions, devices, network, folders, data, two steps."""
    loaded = open_recipe(recipe, overrides)
    from mtp_lightning.launch.local import needs_ranks, run_ranks

    if needs_ranks(loaded.recipe, os.environ):
        raise typer.Exit(run_ranks(loaded.recipe, sys.argv[1:]))
    from mtp_lightning.diagnostics.preflight import preflight

    raise typer.Exit(preflight(loaded.recipe))


DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and do nothing.")]
TestOnlyOption = Annotated[bool, typer.Option("--test-only", help="Ask Slurm whether and when it could start.")]
AfterOption = Annotated[str | None, typer.Option(metavar="JOB", help="Start when this job has ended well.")]
ThenOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COMMAND", help="Run this mtp command on the finished run, {run}, as a job of one rank; repeatable."
    ),
]
PreflightOption = Annotated[bool, typer.Option("--preflight", help="Run mtp preflight first, and train if it passes.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Submit what cannot fit by `mtp plan`.")]


def submit(
    ctx: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    site: Annotated[str, typer.Option(help="Name of a site in cluster/sites, or the path of its file.")],
    dry_run: DryRunOption = False,
    test_only: TestOnlyOption = False,
    after: AfterOption = None,
    then: ThenOption = None,
    preflight: PreflightOption = False,
    force: ForceOption = False,
) -> None:
    """Submit a recipe to Slurm; site.KEY=VALUE among the overrides changes the site for this submission."""
    of_site, of_recipe = split_overrides(overrides or [])
    own = open_recipe(recipe, of_recipe).recipe
    options = SubmitOptions(
        site, of_site, after, then or [], dry_run, test_only, preflight, force, ctx.find_root().command
    )
    hand_in([own], options, folder=Path(own.run.dir), name=own.name)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell changes of the site from all other arguments."""
    from mtp_lightning.launch.site import OVERRIDE

    of_site = [argument.removeprefix(OVERRIDE) for argument in arguments if argument.startswith(OVERRIDE)]
    return of_site, [argument for argument in arguments if not argument.startswith(OVERRIDE)]


@dataclass(frozen=True)
class SubmitOptions:
    """How runs go to Slurm: the options that `mtp submit` and `mtp sweep` share."""

    site: str
    of_site: Sequence[str]
    after: str | None
    then: Sequence[str]
    is_dry_run: bool
    is_test: bool
    has_preflight: bool
    is_forced: bool
    mtp: Any  # the whole command line, to look verbs up in


def hand_in(
    recipes: "Sequence[Recipe]",
    options: SubmitOptions,
    *,
    folder: Path,
    name: str,
    begin: Callable[[], None] | None = None,
) -> None:
    """Print the job's script and submit it, unless it is only tried; `begin` is called before anything is written."""
    from mtp_lightning.launch import scheduler
    from mtp_lightning.launch.site import load_site
    from mtp_lightning.launch.submission import prepare, split_command

    if options.after is not None:
        scheduler.check_job(options.after)  # before anything is printed or written
    described = load_site(options.site, options.of_site)
    for command in options.then:
        _check_verb(split_command(command), options.mtp)
    submission = prepare(
        recipes,
        described,
        options.site,
        folder=folder,
        name=name,
        force=options.is_forced,
        has_preflight=options.has_preflight,
        then=options.then,
    )
    print(submission.script, end="")
    if submission.follow_script is not None:
        print("\n" + submission.follow_script, end="")
    sys.stdout.flush()  # what cannot be printed is not submitted either: who is told of a failure tries again
    if options.is_dry_run:
        return
    out = screen(stderr=True)
    if options.is_test:
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
            script.write(submission.script)
            script.flush()
            out.print(scheduler.submit(Path(script.name), after=options.after, is_test=True))
        return
    if begin is not None:
        begin()
    job, follow = submission.submit(after=options.after)
    out.print(f"job {job} ({described.description or options.site})")
    if follow is not None:
        out.print(f"job {follow} runs after it: {'; '.join(options.then)}")
    out.print(f"logs {submission.folder}/slurm-*.out")
    out.print(f"follow it with: mtp status {folder} --watch")


def _check_verb(words: Sequence[str], root: Any) -> None:
    """Refuse a command that `mtp` does not have, now and not after the training."""
    from mtp_lightning.errors import LaunchError

    command: Any = root
    for word in words:
        if not hasattr(command, "commands"):
            return
        if word not in command.commands:
            raise LaunchError("--then must be a command of mtp", word, f"Choose among: {', '.join(command.commands)}")
        command = command.commands[word]
    if hasattr(command, "commands"):
        raise LaunchError("--then must be a whole command", " ".join(words), f"Add {', '.join(command.commands)}")
