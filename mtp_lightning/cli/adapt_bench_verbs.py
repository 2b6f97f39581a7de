"""`mtp bench adapt`."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_lightning.cli.generate import DeviceName, DeviceOption, device_of


def adapt(
    base: Annotated[
        Path,
        typer.Argument(metavar="BASE", help="Folder that `mtp import MODEL --out BASE` wrote.", show_default=False),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="Recipes to lay over BASE's, and fields to change in all of them.",
            show_default=False,
        ),
    ] = None,
    *,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Train every recipe with seeds 0 to N - 1.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the runs.")] = Path("runs/adapt/compared"),
    offsets: Annotated[
        int | None,
        typer.Option(metavar="K", help="How many tokens ahead; the recipes' heads unless given.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out texts.")] = 50,
    last: Annotated[int, typer.Option(min=1, help="Tokens at the end of each text to measure at.")] = 20,
    top: Annotated[int, typer.Option(help="Is the true token among so many likeliest?")] = 5,
    nucleus: Annotated[float, typer.Option(help="Share of the probability that is summed over.")] = 0.99,
    paths: Annotated[int, typer.Option(help="Most paths that are summed over.")] = 1024,
    device: DeviceOption = DeviceName.auto,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, too.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw the figures, too.")] = None,
) -> None:
    """Train recipes from one imported model, and compare their heads with what the model says without them.

    Given again after an interruption, it goes on where it was; what is finished is not done again.
    """
    from mtp_lightning.bench.adapt_plan import most_offsets, plan_runs

    runs = plan_runs(base, arguments or [], num_seeds=seeds, out=out)
    from mtp_lightning.bench.adapt import Outputs, bench_adapt
    from mtp_lightning.bench.adapt_measuring import Settings

    settings = Settings(
        num_offsets=most_offsets(runs) if offsets is None else offsets,
        num_samples=samples,
        last_tokens=last,
        top=top,
        nucleus=nucleus,
        most_paths=paths,
        device=str(device_of(device)),
    )
    bench_adapt(base, runs, settings, Outputs(json, plot))
