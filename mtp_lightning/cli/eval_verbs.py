"""`mtp eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_lightning.cli.generate_verbs import DeviceName, DeviceOption, DtypeName, DtypeOption, ModelArgument

if TYPE_CHECKING:
    from rich.table import Table

    from mtp_lightning.evaluation.acceptance import Acceptance

app = typer.Typer(no_args_is_help=True, help="Ask questions of a trained model.")


@app.callback()
def describe() -> None:
    """Ask questions of a trained model."""


@app.command()
def acceptance(
    path: ModelArgument,
    *,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows to measure on.")] = 256,
    shards: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Shards to measure on. [default: the recipe's data]")
    ] = None,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, too.")
    ] = None,
) -> None:
    """Measure on held-out rows how often each offset's drafts are accepted, greedily and under sampling."""
    import json

    from mtp_lightning.cli.generate_verbs import device_of, dtype_of
    from mtp_lightning.cli.screen import screen
    from mtp_lightning.evaluation.acceptance import measure_acceptance

    measured = measure_acceptance(
        path, num_rows=rows, shards=shards, device=str(device_of(device)), dtype=dtype_of(dtype)
    )
    screen().print(_table(measured))
    figures = measured.figures
    lengths = f"accepted length  {figures['accepted_length']:.3f} tokens per forward"
    if measured.num_offsets > 1:
        lengths += f", {figures['sampled_length']:.3f} under sampling"
    screen().print(f"{lengths}; {measured.num_rows:,} rows")
    for source, own in measured.by_source.items():
        screen().print(f"  of {source}  {own['accepted_length']:.3f}, {own['sampled_length']:.3f} under sampling")
    if json_path is not None:
        json_path.write_text(json.dumps(measured.as_json(), indent=2) + "\n")


def _table(measured: "Acceptance") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    kinds = {
        "loss": ("loss\nnats", ".3f"),
        "label_accuracy": ("top-1\nlabel", ".1%"),
        "agreement": ("agrees\nwith main", ".1%"),
        "conditional_acceptance": ("accepted\nif so far", ".1%"),
        "cumulative_acceptance": ("accepted\ncumulative", ".1%"),
        "overlap": ("overlap\nwith main", ".1%"),
        "sampled_acceptance": ("accepted\nsampling", ".1%"),
    }
    table.add_column("\noffset", justify="right")
    for head, _ in kinds.values():
        table.add_column(head, justify="right")
    for k in range(1, measured.num_offsets + 1):
        found = ((measured.figures.get(f"{kind}_{k}"), form) for kind, (_, form) in kinds.items())
        table.add_row(str(k), *("-" if figure is None else f"{figure:{form}}" for figure, form in found))
    return table
