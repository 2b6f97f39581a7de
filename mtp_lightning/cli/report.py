"""`mtp report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_lightning.errors import visible

if TYPE_CHECKING:
    from rich.table import Table

    from mtp_lightning.evaluation.comparison import Group, Spread

app = typer.Typer(no_args_is_help=True, help="Put finished runs side by side.")


@app.callback()
def describe() -> None:
    """Put finished runs side by side."""


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, of any number of seeds.", show_default=False)
    ],
    *,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw acceptance and loss, too.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, too.")
    ] = None,
) -> None:
    """Compare recipes by the last validation of their runs: loss of the main head, accepted length, acceptance."""
    from mtp_lightning.cli.targets import PICTURES, check_target, write_json
    from mtp_lightning.console.errors import screen
    from mtp_lightning.evaluation.comparison import as_json, draw, read_run
    from mtp_lightning.evaluation.comparison import compare as compare_runs

    check_target(json_path, "--json")
    check_target(plot, "--plot", endings=PICTURES, makes_folders=True)
    groups = compare_runs(read_run(run) for run in runs)
    screen().print(_table(groups))
    for remark in _remarks(groups):
        screen().print(remark)
    if json_path is not None:
        write_json(as_json(groups), json_path, "--json")
    if plot is not None:
        draw(groups, plot)


@app.command()
def mixture(
    run: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run, one of its checkpoints, or an export.", show_default=False)
    ],
    *,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where to draw it; in a run folder mixture.png unless given.")
    ] = None,
) -> None:
    """Show what each head has learnt to read of the trunk's layers (adapt.layer_mix)."""
    from rich import box
    from rich.table import Table

    from mtp_lightning.cli.targets import PICTURES, check_target
    from mtp_lightning.console.errors import screen
    from mtp_lightning.evaluation.mixture import draw, read_mixtures

    check_target(plot, "--plot", endings=PICTURES, makes_folders=True)
    mixtures = read_mixtures(run)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for name in ("offset", "mean layer", *(f"layer {number}" for number in range(1, len(mixtures[0].shares) + 1))):
        table.add_column(name, justify="right")
    for own in mixtures:
        table.add_row(str(own.offset), f"{own.depth:.2f}", *(f"{share:.1%}" for share in own.shares))
    screen().print(table)
    picture = plot or (run / "mixture.png" if (run / "recipe.yaml").is_file() else None)
    if picture is not None:
        draw(mixtures, picture)
        screen().print(f"drawn: {picture}")


def _table(groups: "list[Group]") -> "Table":
    from rich import box
    from rich.table import Table

    offsets = range(2, max(group.num_offsets for group in groups) + 1)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for name in ("recipe", "seeds", "main loss", "change", "length", "sampled", *(f"to {k}" for k in offsets)):
        table.add_column(name, justify="left" if name == "recipe" else "right")
    for group in groups:
        figures = group.figures
        accepted = [_text(figures.get(f"acceptance_rate_{k}"), ".3f") for k in offsets]
        table.add_row(
            visible(group.recipe, kept=""),
            str(len(group.seeds)),
            _text(figures["loss_1"], ".4f"),
            _text(group.loss_change if group is not groups[0] else None, "+.4f"),
            _text(figures.get("mean_acceptance_length"), ".3f"),
            _text(figures.get("sampled_acceptance_length"), ".3f"),
            *accepted,
        )
    return table


def _text(figure: "Spread | None", form: str) -> str:
    if figure is None:
        return "-"
    margin = "" if figure.margin is None else f" ±{figure.margin:{form.lstrip('+')}}"
    return f"{figure.mean:{form}}{margin}"


def _remarks(groups: "list[Group]") -> list[str]:
    remarks = [
        "change: of the main head's loss in nats, against the first recipe, seed by seed; sampled: accepted length "
        "under sampling; to k: share of positions where all drafts up to offset k are accepted; ±: half a 95 % "
        "interval over seeds (t).",
    ]
    tokens = sorted({count for group in groups for count in group.tokens})
    if len(tokens) > 1:
        remarks.append(f"Not at equal tokens: {', '.join(f'{count:,}' for count in tokens)}.")
    if any(len(group.seeds) < 2 for group in groups):
        remarks.append("A single seed has no interval: differences may be chance.")
    return remarks
