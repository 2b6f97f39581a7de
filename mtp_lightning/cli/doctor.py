"""`mtp doctor`."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    *,
    strategies: Annotated[
        bool, typer.Option("--strategies", help="Hold every ZeRO stage and schedule against plain torch, on CPU ranks.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="With --strategies: every combination, which takes minutes.")
    ] = False,
    results: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Say what this machine has to train with, or with --strategies whether it trains right."""
    if not strategies:
        if full or results:
            raise typer.BadParameter("goes with --strategies only", param_hint="--full" if full else "--results")
        from mtp_lightning.cli.doctor_view import print_machine

        print_machine()
        return
    if results is not None:  # this process is one of the ranks that the line below starts
        from mtp_lightning.cli.doctor_view import walk_as_rank

        walk_as_rank(results, full=full)
        return
    from mtp_lightning.cli.doctor_view import print_outcomes
    from mtp_lightning.diagnostics.parity import compare_strategies

    if not print_outcomes(compare_strategies(full=full)):
        raise typer.Exit(1)
