"""`mtp extend`."""

from pathlib import Path
from typing import Annotated

import typer


def extend(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Folder of a run (its newest complete checkpoint is taken), a checkpoint, or an exported folder.",
            show_default=False,
        ),
    ],
    *,
    to: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to predict, the next one included.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.", show_default=False)],
    group: Annotated[
        int | None,
        typer.Option(min=1, help="How many trained heads to copy, the last ones; all beyond the first unless given."),
    ] = None,
    train_free: Annotated[
        bool, typer.Option("--train-free", help="For decoding and evaluation as it is: set nothing up to be trained.")
    ] = False,
) -> None:
    """Give a trained model more heads by copying its own, ready to be trained with everything else frozen."""
    from mtp_lightning.checkpoint.convert.add_heads import extend_checkpoint

    extend_checkpoint(path, out, to, group=group, train_free=train_free)
