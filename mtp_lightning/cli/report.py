"""`mtp report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_lightning.cli.targets import JsonOption, check_picture
from mtp_lightning.errors import visible

if TYPE_CHECKING:
    from rich.table import Table

    from mtp_lightning.evaluation.comparison import Group, Spread
    from mtp_lightning.evaluation.marginal import MarginalReport

app = typer.Typer(no_args_is_help=True, help="Put finished runs side by side.")


@app.callback()
def describe() -> None:
    """Put finished runs side by side."""


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, of any number of seeds; or sweeps.", show_default=False),
    ],
    *,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", callback=check_picture, help="Draw acceptance and loss, too.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Compare recipes by the last validation of their runs: loss of the main head, acceptance length, acceptance."""
    from mtp_lightning.cli.recipe_argument import open_runs
    from mtp_lightning.console.errors import screen
    from mtp_lightning.console.tables import write_json
    from mtp_lightning.evaluation.comparison import as_json, draw, read_run
    from mtp_lightning.evaluation.comparison import compare as compare_runs

    groups = compare_runs(read_run(run) for run in open_runs(runs))
    screen().print(_table(groups))
    if measured := next((group.marginal for group in groups if group.marginal), None):
        screen().print("", _marginal_table(groups, measured), sep="\n")
    for remark in _table_notes(groups):
        screen().print(remark)
    write_json(json_path, as_json(groups))
    if plot is not None:
        draw(groups, plot)


@app.command()
def mixture(
    run: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run, one of its checkpoints, or an export.", show_default=False)
    ],
    *,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG", callback=check_picture, help="Where to draw it; in a run folder mixture.png unless given."
        ),
    ] = None,
) -> None:
    """Show what each head has learnt to read of the trunk's layers (adapt.layer_mix)."""
    from mtp_lightning.console.errors import screen, table_of
    from mtp_lightning.evaluation.lens import draw, read_mixtures

    mixtures = read_mixtures(run)
    layers = (f"layer {number}" for number in range(1, len(mixtures[0].shares) + 1))
    table = table_of(["offset", "mean layer", *layers])
    for own in mixtures:
        table.add_row(str(own.offset), f"{own.depth:.2f}", *(f"{share:.1%}" for share in own.shares))
    screen().print(table)
    picture = plot or (run / "mixture.png" if (run / "recipe.yaml").is_file() else None)
    if picture is not None:
        draw(mixtures, picture)
        screen().print(f"drawn: {picture}")


def _table(groups: "list[Group]") -> "Table":
    from mtp_lightning.console.errors import table_of

    offsets = range(2, max(group.num_offsets for group in groups) + 1)
    columns = ["recipe", "seeds", "main loss", "change", "length", "sampled", *(f"to {k}" for k in offsets)]
    table = table_of(columns, left=0)
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


def _marginal_table(groups: "list[Group]", measured: "MarginalReport") -> "Table":
    """Lay out top accuracies: of the next token, then of every further one by its head, and without it."""
    from mtp_lightning.console.errors import table_of

    offsets = range(2, len(measured.offsets) + 1)
    kinds = [(k, kind) for k in offsets for kind in ("head", "marginal")]
    heads = [f"{k} {kind}" for k, kind in kinds]
    table = table_of([f"top-{measured.top}, at offset", "1", *heads], left=0)
    for group in groups:
        figures = (group.figures.get(f"{kind}_top_{k}") for k, kind in [(1, "marginal"), *kinds])
        table.add_row(visible(group.recipe, kept=""), *(_text(figure, ".3f") for figure in figures))
    return table


def _text(figure: "Spread | None", form: str) -> str:
    if figure is None:
        return "-"
    margin = "" if figure.margin is None else f" ±{figure.margin:{form.lstrip('+')}}"
    return f"{figure.mean:{form}}{margin}"


def _table_notes(groups: "list[Group]") -> list[str]:
    table_notes = [
        "change: of the main head's loss in nats, against the first recipe, seed by seed; sampled: acceptance length "
        "under sampling; to k: share of positions where all drafts up to offset k are accepted; ±: half a 95 % "
        "interval over seeds (t).",
    ]
    if measured := next((group.marginal for group in groups if group.marginal), None):
        table_notes.append(
            f"top-{measured.top}: is the true token among the {measured.top} likeliest, at {measured.num_positions:,} "
            f"positions at the ends of {measured.num_samples} held-out texts, the same for all; marginal: without the "
            f"head, by that row's main head, summed over the tokens in between: {measured.nucleus:.0%} of the "
            f"probability, at most {measured.most_paths:,} paths."
        )
    tokens = sorted({count for group in groups for count in group.tokens})
    if len(tokens) > 1:
        table_notes.append(f"Not at equal tokens: {', '.join(f'{count:,}' for count in tokens)}.")
    if any(len(group.seeds) < 2 for group in groups):
        table_notes.append("A single seed has no interval: differences may be chance.")
    return table_notes
