"""`mtp report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mtp_lightning.cli.generate import DeviceName, DeviceOption
from mtp_lightning.cli.targets import JsonOption, check_page, check_picture
from mtp_lightning.errors import visible

if TYPE_CHECKING:
    from mtp_lightning.evaluation.comparison import Group
    from mtp_lightning.evaluation.marginal import MarginalReport
    from mtp_lightning.evaluation.probes import ProbeReport
    from mtp_lightning.evaluation.spread import Spread


class ReportGroup(TyperGroup):
    """Verbs about runs, of which `page` need not be named: `mtp report RUN... --html FILE`."""

    unnamed = "page"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read arguments that begin with no verb as those of `page`."""
        is_verb = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if is_verb else [self.unnamed, *args])


app = typer.Typer(cls=ReportGroup, no_args_is_help=True, help="Put runs side by side.")


@app.callback()
def describe() -> None:
    """Put runs side by side: `mtp report RUN... --html report.html` writes them onto a page."""


@app.command()
def page(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of them.", show_default=False)
    ],
    *,
    html: Annotated[
        Path, typer.Option("--html", metavar="FILE", callback=check_page, help="Where to write the page.")
    ] = Path("report.html"),
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Show the drafts in what each run's last checkpoint makes of this."),
    ] = None,
    sample_text: Annotated[Path | None, typer.Option(metavar="FILE", help="Show the drafts along this text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="With --prompt: longest continuation.")] = 96,
    device: DeviceOption = DeviceName.auto,
) -> None:
    """Write runs, running or ended, onto one HTML page: curves, acceptance, drafts, results, recipes, restarts.

    The page holds all that it needs and asks nothing of the network. `mtp report RUN...` is the same.
    """
    from mtp_lightning.console.errors import screen
    from mtp_lightning.evaluation.run_page.runs import find_runs, read_runs
    from mtp_lightning.evaluation.run_page.write import write_page

    if prompt is not None and sample_text is not None:
        raise typer.BadParameter("give either --prompt or --sample-text", param_hint="--prompt")
    found, given = read_runs(find_runs(runs)), sample_text if prompt is None else prompt
    drafts = []
    if given is not None:
        from mtp_lightning.cli.generate import device_of
        from mtp_lightning.evaluation.run_page.drafts import drafts_of

        drafts = drafts_of(found, given, max_new_tokens=max_new_tokens, device=device_of(device))
    write_page(found, html, drafts=drafts)
    screen().print(f"written: {html}, {len(found)} run{'s' if len(found) > 1 else ''}", soft_wrap=True)


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
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", callback=check_page, help="Write the page of mtp report, too."),
    ] = None,
) -> None:
    """Compare recipes by the last validation of their runs: loss of the main head, acceptance length, acceptance."""
    from mtp_lightning.cli.recipe_argument import open_runs
    from mtp_lightning.console.errors import screen, table_of
    from mtp_lightning.console.tables import write_json
    from mtp_lightning.evaluation.comparison import as_json, draw, read_run
    from mtp_lightning.evaluation.comparison import compare as compare_runs

    folders = open_runs(runs)
    groups = compare_runs(read_run(run) for run in folders)
    tables, notes = _tables(groups), _table_notes(groups)
    for place, (columns, rows) in enumerate(tables):
        table = table_of(columns, left=0)
        for row in rows:
            table.add_row(*row)
        screen().print(*([""] if place else []), table, sep="\n")
    for remark in notes:
        screen().print(remark)
    write_json(json_path, as_json(groups))
    if plot is not None:
        draw(groups, plot)
    if html is not None:
        from mtp_lightning.evaluation.run_page.runs import find_runs, read_runs
        from mtp_lightning.evaluation.run_page.write import write_page

        write_page(read_runs(find_runs(folders)), html, comparison={"tables": tables, "notes": notes})


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
    from mtp_lightning.console.errors import finish_without_output, screen, table_of
    from mtp_lightning.evaluation.lens import draw, read_mixtures

    picture = plot or (run / "mixture.png" if (run / "recipe.yaml").is_file() else None)
    if picture is not None:
        finish_without_output()
    mixtures = read_mixtures(run)
    layers = (f"layer {number}" for number in range(1, len(mixtures[0].shares) + 1))
    table = table_of(["offset", "mean layer", *layers])
    for own in mixtures:
        table.add_row(str(own.offset), f"{own.depth:.2f}", *(f"{share:.1%}" for share in own.shares))
    screen().print(table)
    if picture is not None:
        draw(mixtures, picture)
        screen().print(f"drawn: {picture}")


def _tables(groups: "list[Group]") -> list[tuple[list[str], list[list[str]]]]:
    """Return columns and rows of the figures at the end, and of what verbs of `mtp eval` have measured, if anything."""
    measured = next((group.marginal for group in groups if group.marginal), None)
    probes = {report.probe: report for group in groups for report in group.probes}
    return [
        _table(groups),
        *([_marginal_table(groups, measured)] if measured else []),
        *(_probe_table(groups, report) for report in probes.values()),
    ]


def _table(groups: "list[Group]") -> tuple[list[str], list[list[str]]]:
    offsets = range(2, max(group.num_offsets for group in groups) + 1)
    columns = ["recipe", "seeds", "main loss", "change", "length", "sampled", *(f"to {k}" for k in offsets)]
    rows = []
    for group in groups:
        figures = group.figures
        accepted = [_text(figures.get(f"acceptance_rate_{k}"), ".3f") for k in offsets]
        rows.append(
            [
                visible(group.recipe, kept=""),
                str(len(group.seeds)),
                _text(figures["loss_1"], ".4f"),
                _text(group.loss_change if group is not groups[0] else None, "+.4f"),
                _text(figures.get("mean_acceptance_length"), ".3f"),
                _text(figures.get("sampled_acceptance_length"), ".3f"),
                *accepted,
            ]
        )
    return columns, rows


def _marginal_table(groups: "list[Group]", measured: "MarginalReport") -> tuple[list[str], list[list[str]]]:
    """Lay out top accuracies: of the next token, then of every further one by its head, and without it."""
    offsets = range(2, len(measured.offsets) + 1)
    kinds = [(k, kind) for k in offsets for kind in ("head", "marginal")]
    heads = [f"{k} {kind}" for k, kind in kinds]
    rows = []
    for group in groups:
        figures = (group.figures.get(f"{kind}_top_{k}") for k, kind in [(1, "marginal"), *kinds])
        rows.append([visible(group.recipe, kept=""), *(_text(figure, ".3f") for figure in figures)])
    return [f"top-{measured.top}, at offset", "1", *heads], rows


def _probe_table(groups: "list[Group]", report: "ProbeReport") -> tuple[list[str], list[list[str]]]:
    """Lay out accuracies on a synthetic task, by group of its problems."""
    names = [own.group for own in report.accuracies]
    rows = [
        [visible(group.recipe, kept=""), *(_text(group.figures.get(f"{report.probe}_{name}"), ".3f") for name in names)]
        for group in groups
    ]
    return [f"{report.probe}, accuracy", *(visible(name, kept="") for name in names)], rows


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
