"""`mtp export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """What can be written."""

    consolidated = "consolidated"
    hf = "hf"
    hf_mtp = "hf_mtp"


class Dtype(StrEnum):
    """Types of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Folder of a run (its newest complete checkpoint is taken), or one of its checkpoints; for hf also an "
            "exported or imported folder.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.", show_default=False)],
    format: Annotated[
        Format,
        typer.Option(
            help="consolidated: all heads, with recipe.yaml. hf: the next-token model as transformers reads it. "
            "hf_mtp: with sequential modules beside it, under DeepSeek's names."
        ),
    ] = Format.consolidated,
    dtype: Annotated[Dtype, typer.Option(help="Type of the exported weights.")] = Dtype.fp32,
) -> None:
    """Write a checkpoint, however many ranks made it, as one folder that other tools can read; needs no GPU."""
    if format is Format.consolidated:
        from mtp_lightning.checkpoint.convert.consolidate import consolidate

        consolidate(path, out, dtype=dtype.value)
    else:
        from mtp_lightning.checkpoint.huggingface.export_model import export_hf

        export_hf(path, out, dtype=dtype.value, with_modules=format is Format.hf_mtp)
