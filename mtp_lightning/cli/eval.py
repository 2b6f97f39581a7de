"""`mtp eval`."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_lightning.cli import eval_code, eval_harness, eval_probes
from mtp_lightning.cli.generate import (
    DeviceName,
    DeviceOption,
    DtypeName,
    DtypeOption,
    ModelArgument,
    WeightsName,
    WeightsOption,
)
from mtp_lightning.cli.targets import JsonOption, check_picture

if TYPE_CHECKING:
    from rich.table import Table

    from mtp_lightning.evaluation.acceptance import Acceptance
    from mtp_lightning.evaluation.marginal import MarginalReport

app = typer.Typer(no_args_is_help=True, help="Ask questions of a trained model.")


@app.callback()
def describe() -> None:
    """Ask questions of a trained model."""


app.command()(eval_code.code)
app.command()(eval_harness.harness)
app.command()(eval_probes.induction)
app.command()(eval_probes.polynomial)


@app.command()
def acceptance(
    path: ModelArgument,
    *,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows to measure on.")] = 256,
    shards: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Shards to measure on; the recipe's data unless given.")
    ] = None,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
    weights: WeightsOption = WeightsName.trained,
    json_path: JsonOption = None,
) -> None:
    """Measure on held-out rows how often each offset's drafts are accepted, greedily and under sampling."""
    from mtp_lightning.cli.generate import device_of, dtype_of
    from mtp_lightning.console.errors import screen
    from mtp_lightning.console.tables import write_json
    from mtp_lightning.evaluation.acceptance import measure_acceptance

    measured = measure_acceptance(
        path, num_rows=rows, shards=shards, device=str(device_of(device)), dtype=dtype_of(dtype)
    )
    screen().print(_table(measured))
    figures = measured.figures
    lengths = f"acceptance length  {figures['mean_acceptance_length']:.3f} tokens per forward"
    if measured.num_offsets > 1:
        lengths += f", {figures['sampled_acceptance_length']:.3f} under sampling"
    screen().print(f"{lengths}; {measured.num_rows:,} rows")
    for source, own in measured.by_source.items():
        screen().print(
            f"  of {source}  {own['mean_acceptance_length']:.3f}, {own['sampled_acceptance_length']:.3f} under sampling"
        )
    write_json(json_path, measured.as_json())


def _table(measured: "Acceptance") -> "Table":
    from mtp_lightning.console.errors import table_of

    kinds = {
        "loss": ("loss\nnats", ".3f"),
        "label_accuracy": ("top-1\nlabel", ".1%"),
        "agreement": ("agrees\nwith main", ".1%"),
        "conditional_acceptance_rate": ("accepted\nif so far", ".1%"),
        "acceptance_rate": ("accepted\ncumulative", ".1%"),
        "overlap": ("overlap\nwith main", ".1%"),
        "sampled_acceptance_rate": ("accepted\nsampling", ".1%"),
        "outside_draft_vocabulary": ("target not\nin drafts", ".1%"),
    }
    if "outside_draft_vocabulary_2" not in measured.figures:
        del kinds["outside_draft_vocabulary"]
    table = table_of(["\noffset", *(head for head, _ in kinds.values())])
    for k in range(1, measured.num_offsets + 1):
        found = ((measured.figures.get(f"{kind}_{k}"), form) for kind, (_, form) in kinds.items())
        table.add_row(str(k), *("-" if figure is None else f"{figure:{form}}" for figure, form in found))
    return table


@app.command()
def marginal(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Runs, checkpoints, exports; or a sweep, for its runs.", show_default=False
        ),
    ],
    *,
    offsets: Annotated[int, typer.Option(metavar="K", help="How many tokens ahead.")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Held-out texts.")] = 50,
    last: Annotated[int, typer.Option(min=1, help="Tokens at the end of each text to measure at.")] = 20,
    top: Annotated[int, typer.Option(help="Is the true token among so many likeliest?")] = 5,
    nucleus: Annotated[float, typer.Option(help="Share of the probability that is summed over.")] = 0.99,
    most_paths: Annotated[int, typer.Option("--paths", help="Most paths that are summed over.")] = 1024,
    device: DeviceOption = DeviceName.auto,
    weights: WeightsOption = WeightsName.trained,
    json_path: JsonOption = None,
) -> None:
    """Predict tokens further on with the main head alone, summed over those in between, beside the heads.

    Of a run's trained weights it is kept in its folder: mtp report compare shows it, and the same question is not
    computed again.
    """
    from mtp_lightning.cli.generate import device_of
    from mtp_lightning.cli.recipe_argument import open_runs
    from mtp_lightning.console.errors import screen
    from mtp_lightning.console.tables import write_json
    from mtp_lightning.evaluation.kept_reports import MARGINAL
    from mtp_lightning.evaluation.marginal import measure_marginal

    runs, reports = open_runs(paths), []
    settings: dict[str, Any] = {
        "num_offsets": offsets,
        "num_samples": samples,
        "last_tokens": last,
        "top": top,
        "nucleus": nucleus,
        "most_paths": most_paths,
    }
    measure = functools.partial(measure_marginal, device=str(device_of(device)), **settings)
    for run in runs:
        of_run = functools.partial(measure, run)
        report = MARGINAL.measured(run, settings, of_run) if weights is WeightsName.trained else of_run()
        reports.append(report.as_json())
        if len(runs) > 1:
            screen().print(str(run), soft_wrap=True)
        screen().print(_marginal_table(report))
    screen().print(
        f"{report.num_positions:,} positions at the ends of {report.num_samples} held-out texts; summed over "
        f"{nucleus:.0%} of the probability, at most {most_paths:,} paths"
    )
    write_json(json_path, reports if len(runs) > 1 else reports[0])


def _marginal_table(report: "MarginalReport") -> "Table":
    from mtp_lightning.console.errors import table_of

    best = f"top-{report.top}"
    heads = ["offset", "marginal\ntop-1", f"marginal\n{best}", "head\ntop-1", f"head\n{best}", "paths", "mass"]
    table = table_of(heads)
    for row in report.offsets:
        shares = (row.marginal_top1, row.marginal_top, row.head_top1, row.head_top)
        shown = ("-" if share is None else f"{share:.3f}" for share in shares)
        table.add_row(str(row.offset), *shown, f"{row.mean_paths:,.0f}", f"{row.mean_mass:.3f}")
    return table


@app.command()
def lens(
    path: ModelArgument,
    *,
    samples: Annotated[int, typer.Option(min=1, help="Held-out texts.")] = 32,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", callback=check_picture, help="Draw the figures, too.")
    ] = None,
    device: DeviceOption = DeviceName.auto,
    json_path: JsonOption = None,
) -> None:
    """Read every layer as if it were the last: where does the model commit to the next token?"""
    from mtp_lightning.cli.generate import device_of
    from mtp_lightning.console.errors import screen, table_of
    from mtp_lightning.console.tables import write_json
    from mtp_lightning.evaluation.lens import draw_lens, measure_lens

    report = measure_lens(path, num_samples=samples, device=str(device_of(device)))
    table = table_of(["layer", "depth", "KL from final, nats", "same likeliest token"])
    for number, layer in enumerate(report.layers):
        table.add_row(str(number), f"{layer.depth:.2f}", f"{layer.kl:.4f}", f"{layer.agreement:.1%}")
    screen().print(table)
    screen().print(f"{report.num_positions:,} positions; layer 0 is the embedding")
    write_json(json_path, report.as_json())
    if plot is not None:
        draw_lens(report, plot)
