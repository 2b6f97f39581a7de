"""`mtp import`, `mtp export`, `mtp extend`: models from and for others, and more heads on a trained one."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mtp_lightning.checkpoint.export.names import FormatName, format_named
from mtp_lightning.cli.generate import WeightsName, WeightsOption
from mtp_lightning.console.errors import finish_without_output

if TYPE_CHECKING:
    from mtp_lightning.checkpoint.export.write import Check


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

    finish_without_output()
    extend_checkpoint(path, out, to, group=group, train_free=train_free)


def _format(told: str) -> FormatName:
    """Find a format by its name, and say what other words for it are called here."""
    try:
        return format_named(told)
    except ValueError as fault:
        raise typer.BadParameter(str(fault)) from None


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
            help="Folder of a run (its newest complete checkpoint is taken), or one of its checkpoints; but for "
            "consolidated also an exported or imported folder.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.", show_default=False)],
    format: Annotated[
        FormatName,
        typer.Option(
            metavar="|".join(name.value for name in FormatName),
            parser=_format,
            help="consolidated: all heads, with recipe.yaml. trunk: the next-token model as transformers reads it. "
            "The others put heads beside it: docs/howto/serve.md has a table of engines and heads.",
        ),
    ] = FormatName.consolidated,
    dtype: Annotated[Dtype, typer.Option(help="Type of the exported weights.")] = Dtype.fp32,
    weights: WeightsOption = WeightsName.trained,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the folder as its engine does, compare scores, a text and kept drafts with the model's, and "
            "write parity.json into it; nothing is exported where they differ.",
        ),
    ] = False,
    merge_into: Annotated[
        Path | None,
        typer.Option(
            metavar="HF_FOLDER",
            help="Instead of a format: put the trained heads into a copy of the folder that was imported with them; "
            "all else in it stays bit for bit.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a checkpoint, however many ranks made it, as one folder that other tools can read; needs no GPU."""
    if merge_into and (format, dtype) != (FormatName.consolidated, Dtype.fp32):
        raise typer.BadParameter(
            "--merge-into keeps the format and the type of its folder: leave --format, --dtype out"
        )
    finish_without_output()
    check: Check | None = None
    if verify:
        from mtp_lightning.evaluation.export_parity import check_parity

        check = check_parity
    if merge_into:
        from mtp_lightning.checkpoint.export.merge_into import merge_into as merge

        merge(path, merge_into, out, check=check)
        return
    from mtp_lightning.checkpoint.export.write import export_model

    export_model(path, out, format, dtype=dtype.value, check=check)


LONGEST_NUMBER = 12  # digits


class Kind(StrEnum):
    """Head kinds."""

    parallel = "parallel"
    linear = "linear"
    chained = "chained"
    sequential = "sequential"
    recursive = "recursive"
    medusa = "medusa"


class Hidden(StrEnum):
    """What modules read of the trunk: its state behind the final norm, or before it."""

    post_norm = "post_norm"
    pre_norm = "pre_norm"


HiddenState = Annotated[
    Hidden | None,
    typer.Option(
        help="State that sequential and recursive modules read (default: post_norm); `mtp export --format mimo` "
        "holds those of pre_norm.",
        show_default=False,
    ),
]


class Init(StrEnum):
    """What heads beyond the main one start as."""

    native = "native"
    fitted = "fitted"
    copy = "copy"
    random = "random"


class ImportedFamily(StrEnum):
    """How a model is taken in."""

    transformers = "transformers"


def _rows(text: str) -> int | Literal["auto"]:
    """Read a number of rows, or `auto`."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER):
        raise typer.BadParameter(f"must be a number of rows or auto, not {text!r}")
    return int(text)


Base = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="For an adapter: the model that it was trained on (default: as its settings say).",
        show_default=False,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Which weights, where there are several: model.NAME.safetensors.", show_default=False
    ),
]
FitOn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE",
        help="For --init fitted: texts as `mtp data build` takes them, or a folder of shards; may be repeated "
        "(default: Python's standard library).",
    ),
]
ImportedAs = Annotated[
    ImportedFamily | None,
    typer.Option(
        help="transformers: take that library's own classes even for a model that has a trunk here (default: only for "
        "the others).",
        show_default=False,
    ),
]
Rows = Annotated[
    int | None,
    typer.Option(
        metavar="N|auto",
        parser=_rows,
        help="Rows of embedding and unembedding; auto: every id of the tokenizer, and a multiple of 64. New rows "
        "are the mean of the old ones; none is cut.",
        show_default=False,
    ),
]


def import_model(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="HF_FOLDER|FILE.gguf",
            help="Folder of a pretrained model, with config.json and *.safetensors (or Meta's params.json); an "
            "entry of the hub's cache; a LoRA adapter of PEFT, which is merged; or a GGUF file of llama.cpp, which is "
            "dequantised.",
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
    hidden: HiddenState = None,
    init: Annotated[
        Init | None,
        typer.Option(
            help="Heads beyond the main one: the folder's own, fitted to a little text, copies of the last layer, or "
            "random (default: native where there are any, else fitted, else copy).",
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
    fit_on: FitOn = None,
    base: Base = None,
    variant: Variant = None,
    resize_vocabulary: Rows = None,
    family: ImportedAs = None,
) -> None:
    """Put heads on a pretrained model: a folder and a recipe that `mtp train` starts from; needs no GPU."""
    from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder

    finish_without_output()
    wanted = Wanted(
        num_offsets=offsets,
        kind=kind.value if kind else None,
        hidden=hidden.value if hidden else None,
        init=init.value if init else None,
        allow=tuple(allow or ()),
        end_of_document=end_of_document,
        base=base,
        variant=variant,
        vocabulary=resize_vocabulary,
        fit_on=tuple(fit_on or ()),
        family="transformers" if family else None,
    )
    import_folder(path, out, wanted)
