"""`mtp data build | adopt | generate | peek | probe | stats | verify`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from mtp_lightning.cli import data_probe
from mtp_lightning.cli import self_generated as own_text_verbs
from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument, open_recipe
from mtp_lightning.cli.targets import check_picture
from mtp_lightning.console.errors import finish_without_output

app = typer.Typer(
    no_args_is_help=True,
    help="Build, adopt or generate shards of tokens, write synthetic tasks, look at a row, verify and count shards.",
)
app.command()(own_text_verbs.generate)
app.add_typer(data_probe.app, name="probe")


class OnBadRow(StrEnum):
    """What is done with a row that is no document."""

    refuse = "refuse"
    skip = "skip"


class Split(StrEnum):
    """The two parts of the data."""

    train = "train"
    validation = "validation"


InputsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE KEY=VALUE | PATH",
        help="A recipe; or, with --out, texts: files (also JSON, CSV, Parquet, .gz, .zst), folders, globs, stdlib.",
        show_default=False,
    ),
]
OutOption = Annotated[Path | None, typer.Option(help="Folder for the shards; must not exist yet.")]
ShareOption = Annotated[float | None, typer.Option(help="With --out: share of documents held out (0.03 unless given).")]
TokenizerOption = Annotated[
    str | None,
    typer.Option(help="With --out: byte (unless given), a tokenizer.json or its folder, or a SentencePiece *.model."),
]
EndOption = Annotated[
    int | None, typer.Option(min=0, help="With --out: id that ends a document (the tokenizer's own unless given).")
]
ParseOption = Annotated[
    bool,
    typer.Option("--parse-special-tokens", help="With --out: special tokens spelled out in texts become their ids."),
]
AddOption = Annotated[
    bool,
    typer.Option(
        "--add-special-tokens", help="With --out: put the tokenizer's begin of sequence before each document."
    ),
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(metavar="FILE|NAME|plain", help="With --out: template of chats (the tokenizer's own unless given)."),
]
DeduplicateOption = Annotated[
    bool, typer.Option("--deduplicate", help="With --out: leave out documents equal to an earlier one.")
]
TextFieldOption = Annotated[
    str | None, typer.Option(metavar="FIELD", help="With --out: field or column of the text (text unless given).")
]
TemplateOption = Annotated[
    str | None, typer.Option(help="With --out: a text of several fields, e.g. '# {title}\\n{text}'.")
]
EncodingOption = Annotated[
    str | None, typer.Option(help="With --out: encoding of texts without a byte-order mark (utf-8 unless given).")
]
OnBadRowOption = Annotated[
    OnBadRow, typer.Option(help="With --out: refuse a row that is no document, or skip and count such rows.")
]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="With --out: processes (as many as are of use unless given).")
]


@app.command()
def build(
    inputs: InputsArgument = None,
    *,
    out: OutOption = None,
    validation_fraction: ShareOption = None,
    tokenizer: TokenizerOption = None,
    end_of_document: EndOption = None,
    parse_special_tokens: ParseOption = False,
    add_special_tokens: AddOption = False,
    chat_template: ChatTemplateOption = None,
    text_field: TextFieldOption = None,
    template: TemplateOption = None,
    encoding: EncodingOption = None,
    on_bad_row: OnBadRowOption = OnBadRow.refuse,
    deduplicate: DeduplicateOption = False,
    processes: ProcessesOption = None,
) -> None:
    """Build shards: of a recipe's corpus into its cache, or of any texts into a folder."""
    if not inputs:
        raise typer.BadParameter("give a recipe, or texts", param_hint="PATH")
    finish_without_output()
    if out is None:
        given = (
            validation_fraction,
            tokenizer,
            end_of_document,
            chat_template,
            text_field,
            template,
            encoding,
            processes,
        )
        flags = deduplicate or parse_special_tokens or add_special_tokens or on_bad_row == OnBadRow.skip
        _build_of_recipe(inputs, is_for_texts=flags or any(option is not None for option in given))
        return
    from mtp_lightning.data.shards.build import BuildOptions, build_shards
    from mtp_lightning.data.text.records import Reading

    reading = Reading(text_field=text_field, template=template, encoding=encoding, on_bad_row=on_bad_row.value)
    reading.check()
    options = BuildOptions(
        tokenizer=tokenizer or "byte",
        end_of_document=end_of_document,
        parse_special_tokens=parse_special_tokens,
        add_special_tokens=add_special_tokens,
        chat_template=chat_template,
        validation_fraction=own_text_verbs.share_of(validation_fraction),
        deduplicate=deduplicate,
        reading=reading,
    )
    build_shards(inputs, out, options, processes=processes)


def _build_of_recipe(arguments: list[str], *, is_for_texts: bool) -> None:
    recipe = Path(arguments[0])
    is_recipe = recipe.suffix in (".yaml", ".yml") or (recipe / "recipe.yaml").is_file()
    if is_for_texts or not is_recipe:
        raise typer.BadParameter(
            "give --out to build from texts, or else a recipe and fields to change", param_hint="PATH"
        )
    loaded = open_recipe(arguments[0], arguments[1:])
    from mtp_lightning.data.loading.corpus import prepare_shards

    prepare_shards(loaded.recipe)


@app.command()
def adopt(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Tokens of Megatron (.bin and .idx), litdata (index.json), OLMo or Dolma (.npy); or one such file.",
            show_default=False,
        ),
    ],
    *,
    layout: Annotated[
        Literal["megatron", "litdata", "npy"] | None,
        typer.Option("--format", help="Format, found by the files unless given."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for manifest and index (FOLDER-adopted unless given); must not exist.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer that the ids are of, as of `mtp data build`.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Size of the vocabulary, in place of it.")] = None,
    end_of_document: Annotated[
        int | None, typer.Option(min=0, help="Id that ends a document (the tokenizer's own unless given).")
    ] = None,
    begin_of_document: Annotated[
        int | None, typer.Option(min=0, help="With --documents bos: id that begins a document.")
    ] = None,
    documents: Annotated[
        Literal["index", "eos", "bos"] | None,
        typer.Option(help="Documents by the index of the format, or by the id that ends or begins them (.npy: eos)."),
    ] = None,
    dtype: Annotated[
        Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64"] | None,
        typer.Option(help="Type of tokens without a header (by the vocabulary unless given)."),
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share that is held out, the ends of files (0.03 unless given).")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Files to hold out, such as 'val/*', in place of a share.")
    ] = None,
) -> None:
    """Read tokens of Megatron, litdata or OLMo in place, as shards: nothing is copied."""
    finish_without_output()
    if (documents == "bos") != (begin_of_document is not None):
        raise typer.BadParameter("goes with --documents bos, and only with it", param_hint="--begin-of-document")
    if tokenizer is not None and vocab_size is not None:
        raise typer.BadParameter("is in place of --tokenizer", param_hint="--vocab-size")
    if validation is not None and validation_fraction is not None:
        raise typer.BadParameter("is in place of --validation-fraction", param_hint="--validation")
    from mtp_lightning.data.adopted.adopt import AdoptOptions, adopt

    options = AdoptOptions(
        layout=layout,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        end_of_document=end_of_document,
        begin_of_document=begin_of_document,
        documents=documents,
        dtype=dtype,
        validation_fraction=own_text_verbs.share_of(validation_fraction),
        validation=validation,
    )
    adopt(path, out, options)


@app.command()
def peek(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    row: Annotated[int, typer.Option(min=0, help="Number of the row in its split.")] = 0,
    split: Annotated[Split, typer.Option(help="Part of the data.")] = Split.train,
) -> None:
    """Print one row as a table: position, token, document, and the target of every offset."""
    loaded = open_recipe(recipe, overrides)
    from mtp_lightning.data.loading.peek import peek

    peek(loaded.recipe, row=row, split=split.value)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder of shards.", show_default=False)]) -> None:
    """Check every byte of a folder of shards against its manifest and index."""
    from mtp_lightning.data.shards.verify import verify_shards

    verify_shards(folder)


@app.command()
def stats(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of shards.", show_default=False)],
    *,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="PNG", callback=check_picture, help="Draw the lengths into this file, too."),
    ] = None,
) -> None:
    """Count documents and tokens by folder and source, and show how long the documents are."""
    from mtp_lightning.data.shards.stats import show_statistics

    show_statistics(folders, picture=picture)
