"""`mtp eval induction | polynomial`."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_lightning.cli.generate import DeviceName, DeviceOption, DtypeName, DtypeOption
from mtp_lightning.cli.targets import JsonOption, check_picture

if TYPE_CHECKING:
    from mtp_lightning.evaluation.probes import ProbeReport

RunsArgument = Annotated[
    list[Path],
    typer.Argument(metavar="PATH...", help="Runs, checkpoints, exports; or a sweep, for its runs.", show_default=False),
]
DataOption = Annotated[
    Path, typer.Option(metavar="FILE", help="test.jsonl of `mtp data probe`, or rows like its own.", show_default=False)
]


def induction(
    paths: RunsArgument,
    *,
    data: DataOption,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
    json_path: JsonOption = None,
) -> None:
    """Measure how often the second token of a name is right that a story has mentioned before.

    Of a run it is kept in its folder: mtp report compare shows it, and the same question is not computed again.
    """
    _measure("induction", paths, data, device=device, dtype=dtype, json_path=json_path)


def polynomial(
    paths: RunsArgument,
    *,
    data: DataOption,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", callback=check_picture, help="Draw accuracies, over seeds, too.")
    ] = None,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
    json_path: JsonOption = None,
) -> None:
    """Measure how often arithmetic on polynomials is right, by number of operations.

    Of a run it is kept in its folder: mtp report compare shows it, and the same question is not computed again.
    """
    reports = _measure("polynomial", paths, data, device=device, dtype=dtype, json_path=json_path)
    if plot is not None:
        from mtp_lightning.evaluation.probes import draw

        draw(reports, plot)


def _measure(
    probe: str, paths: list[Path], data: Path, *, device: DeviceName, dtype: DtypeName, json_path: Path | None
) -> "list[ProbeReport]":
    from mtp_lightning.cli.generate import device_of, dtype_of
    from mtp_lightning.cli.recipe_argument import open_runs
    from mtp_lightning.console.errors import screen, table_of
    from mtp_lightning.console.tables import write_json
    from mtp_lightning.evaluation.kept_reports import OF_PROBES
    from mtp_lightning.evaluation.probes import measure_probe, read_digest

    runs, reports, settings = open_runs(paths), [], {"data": read_digest(data), "dtype": dtype.value}
    where, kind = str(device_of(device)), dtype_of(dtype)
    for run in runs:
        measure = functools.partial(measure_probe, probe, run, data, device=where, dtype=kind)
        report = OF_PROBES[probe].measured(run, settings, measure)
        reports.append(report)
        table = table_of(["operations" if probe == "polynomial" else "", "accuracy", "95 % interval", "right", "of"])
        for own in report.accuracies:
            figures = (
                f"{own.value:.1%}",
                f"{own.low:.1%} to {own.high:.1%}",
                f"{own.num_right:,}",
                f"{own.num_trials:,}",
            )
            table.add_row(own.group, *figures)
        if len(runs) > 1:
            screen().print(str(run), soft_wrap=True)
        screen().print(table)
    write_json(json_path, [report.as_json() for report in reports] if len(runs) > 1 else reports[0].as_json())
    return reports
