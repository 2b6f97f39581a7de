"""`mtp submit`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument, open_recipe
from mtp_lightning.console.errors import screen

if TYPE_CHECKING:
    from collections.abc import Sequence


def submit(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    site: Annotated[str, typer.Option(help="Name of a site in cluster/sites, or the path of its file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script and do nothing.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask Slurm whether and when it could start.")] = False,
    after: Annotated[str | None, typer.Option(metavar="JOB", help="Start when this job has ended well.")] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COMMAND", help="Run this mtp command on the finished run, {run}, as a job of one rank; repeatable."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="A run for each value, as a job array; repeatable.")
    ] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Run mtp preflight first, and train if it passes.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Submit what cannot fit by `mtp plan`.")] = False,
) -> None:
    """Submit a recipe to Slurm; site.KEY=VALUE among the overrides changes the site for this submission."""
    from mtp_lightning.launch import scheduler
    from mtp_lightning.launch.site import OVERRIDE, load_site
    from mtp_lightning.launch.submission import prepare, split_command
    from mtp_lightning.launch.sweep import folder_name, sweep_points

    given = overrides or []
    of_site = [override.removeprefix(OVERRIDE) for override in given if override.startswith(OVERRIDE)]
    of_recipe = [override for override in given if not override.startswith(OVERRIDE)]
    described = load_site(site, of_site)
    points = sweep_points(sweep or []) if sweep else []
    base = open_recipe(recipe, of_recipe).recipe
    runs = [(folder_name(point), open_recipe(recipe, [*of_recipe, *point]).recipe) for point in points]
    for command in then or []:
        _check_verb(split_command(command))
    submission = prepare(base, runs, described, site, force=force, has_preflight=preflight, then=then or [])
    print(submission.script, end="")
    if submission.follow_script is not None:
        print("\n" + submission.follow_script, end="")
    if dry_run:
        return
    out = screen(stderr=True)
    if test_only:
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
            script.write(submission.script)
            script.flush()
            out.print(scheduler.submit(Path(script.name), after=after, is_test=True))
        return
    job, follow = submission.submit(after=after)
    out.print(f"job {job} ({described.description or site})")
    if follow is not None:
        out.print(f"job {follow} runs after it: {'; '.join(then or [])}")
    out.print(f"logs {submission.folder}/slurm-*.out")
    out.print(f"follow it with: mtp status {base.run.dir} --watch")


def _check_verb(words: "Sequence[str]") -> None:
    """Refuse a command that `mtp` does not have, now and not after the training."""
    from typer.main import get_command

    from mtp_lightning.cli.app import app
    from mtp_lightning.errors import LaunchError

    command: Any = get_command(app)
    for word in words:
        if not hasattr(command, "commands"):
            return
        if word not in command.commands:
            raise LaunchError("--then must be a command of mtp", word, f"Choose among: {', '.join(command.commands)}")
        command = command.commands[word]
    if hasattr(command, "commands"):
        raise LaunchError("--then must be a whole command", " ".join(words), f"Add {', '.join(command.commands)}")
