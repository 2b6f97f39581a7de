"""`mtp sweep`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_lightning.cli.submit import (
    AfterOption,
    DryRunOption,
    ForceOption,
    PreflightOption,
    SubmitOptions,
    TestOnlyOption,
    ThenOption,
    hand_in,
    split_overrides,
)
from mtp_lightning.console.errors import go_on_without_output, guard_output
from mtp_lightning.errors import LaunchError

if TYPE_CHECKING:
    from mtp_lightning.launch.sweep import Member


OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder of the sweep, new or to go on with; runs/sweeps/NAME by the one recipe's or folder's name.",
        show_default=False,
    ),
]
SeedsOption = Annotated[
    str,
    typer.Option(metavar="N|K,K,...", help="Train every recipe with N seeds, from 0; or with each of these seeds."),
]
VaryOption = Annotated[
    list[str] | None, typer.Option(metavar="KEY=V1,V2", help="And with each of these values; repeatable.")
]
BaseOption = Annotated[
    Path | None,
    typer.Option(
        metavar="MODEL",
        help="Folder that `mtp import` wrote: lay every recipe over its own, and start from this model.",
        show_default=False,
    ),
]


def sweep(
    ctx: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|FOLDER|KEY=VALUE",
            help="Recipes, folders of recipes, and fields to change in all of them.",
            show_default=False,
        ),
    ],
    *,
    out: OutOption = None,
    seeds: SeedsOption = "1",
    vary: VaryOption = None,
    base: BaseOption = None,
    site: Annotated[
        str | None, typer.Option(help="Submit to Slurm as a job array: a site as of mtp submit.", show_default=False)
    ] = None,
    dry_run: DryRunOption = False,
    test_only: TestOnlyOption = False,
    after: AfterOption = None,
    then: ThenOption = None,
    preflight: PreflightOption = False,
    force: ForceOption = False,
) -> None:
    """Train recipes with several seeds and values, each in FOLDER/NAME/seedK; given again, go on where they were.

    Runs that are finished are not repeated, recipes and seeds may be added. A recipe may start from another one's run:
    init.path: FOLDER/NAME/seed{seed}. Then: mtp report compare FOLDER.
    """
    from mtp_lightning.launch.sweep import begin_sweep, default_folder, plan_sweep
    from mtp_lightning.launch.sweep_training import DUE, state_of, train_members

    guard_output(go_on_without_output)
    of_site, given = split_overrides(arguments)
    out = out or default_folder(given)
    members = plan_sweep(given, seeds=seeds, vary=vary or [], out=out, base=base, is_later=after is not None)
    states = {member.name: state_of(member) for member in members}
    width = max(map(len, states))
    for number, member in enumerate(members, start=1):
        start = f", starts from {member.starts_from}" if member.starts_from else ""
        line = f"{number:>4}  {member.name:<{width}}  {states[member.name]}{start}"
        print(line, file=sys.stderr if site else sys.stdout, flush=True)  # stdout is left to the job's script
    if site is None:
        _check_local({"after": after, "then": then, "test-only": test_only, "preflight": preflight, "force": force})
        if not dry_run:
            begin_sweep(out, members)
            train_members(members)
            print(f"Then: mtp report compare {shlex.quote(str(out))}", flush=True)
    elif due := [member for member in members if states[member.name] in DUE]:
        _check_independent(due)
        options = SubmitOptions(
            site, of_site, after, then or [], dry_run, test_only, preflight, force, ctx.find_root().command
        )
        recipes = [member.recipe for member in due]
        hand_in(recipes, options, folder=out, name=out.absolute().name, begin=lambda: begin_sweep(out, members))


def _check_independent(members: "list[Member]") -> None:
    names = {member.name for member in members}
    if waiting := [f"{member.name} from {member.starts_from}" for member in members if member.starts_from in names]:
        raise LaunchError(
            "runs of one job array must not start from one another",
            ", ".join(waiting),
            "Submit the recipes that the others start from first, and the others with --after JOB",
        )


def _check_local(options: dict[str, object]) -> None:
    """Refuse what only Slurm can do."""
    if given := [name for name, value in options.items() if value]:
        raise LaunchError(f"--{given[0]} must be left out without --site", "a sweep on this machine", "Give --site")
