"""`mtp doctor`."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    *,
    strategies: Annotated[
        bool, typer.Option("--strategies", help="Compare every ZeRO stage and schedule with plain torch, on CPU ranks.")
    ] = False,
    cells: Annotated[Path | None, typer.Option(hidden=True)] = None,
    results: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Say what this machine has to train with, or with --strategies whether it trains right."""
    if not strategies:
        if cells or results:
            raise typer.BadParameter("goes with --strategies only", param_hint="--cells" if cells else "--results")
        from mtp_lightning.cli.doctor_view import print_machine

        print_machine()
        return
    if cells is not None and results is not None:  # this process is one of the ranks that the line below starts
        from mtp_lightning.cli.doctor_view import compare_as_rank

        compare_as_rank(cells, results)
        return
    from mtp_lightning.cli.doctor_view import print_outcomes
    from mtp_lightning.diagnostics.parity import compare_strategies
    from mtp_lightning.diagnostics.parity_matrix import sample

    if not print_outcomes(compare_strategies(sample())):
        raise typer.Exit(1)
