"""`mtp import`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    """Head kinds."""

    parallel = "parallel"
    linear = "linear"
    chained = "chained"
    sequential = "sequential"
    recursive = "recursive"
    medusa = "medusa"


class Init(StrEnum):
    """What heads beyond the main one start as."""

    native = "native"
    copy = "copy"
    random = "random"


def import_model(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="HF_FOLDER",
            help="Folder of a pretrained model, with config.json and *.safetensors (or Meta's params.json).",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.", show_default=False)],
    offsets: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens to predict, the next one included (default: as in the folder).",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        Kind | None, typer.Option(help="Head kind (default: as in the folder, or parallel).", show_default=False)
    ] = None,
    init: Annotated[
        Init | None,
        typer.Option(
            help="Heads beyond the main one: the folder's own, copies of the last layer, or random "
            "(default: native where there are any, else copy).",
            show_default=False,
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Stored tensors (*) that may be missing, and begin anew, or be left out; may be repeated.",
        ),
    ] = None,
    end_of_document: Annotated[
        int | None, typer.Option(metavar="ID", min=0, help="Id of the token that ends a document.", show_default=False)
    ] = None,
) -> None:
    """Put heads on a pretrained model: a folder and a recipe that `mtp train` starts from; needs no GPU."""
    from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder

    wanted = Wanted(
        num_offsets=offsets,
        kind=kind.value if kind else None,
        init=init.value if init else None,
        allow=tuple(allow or ()),
        end_of_document=end_of_document,
    )
    import_folder(path, out, wanted)
