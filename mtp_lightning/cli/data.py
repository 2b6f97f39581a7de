"""`mtp data build | peek | verify | stats`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mtp_lightning.cli import self_generated as own_text_verbs
from mtp_lightning.cli.generate import DeviceName
from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument, open_recipe

app = typer.Typer(no_args_is_help=True, help="Build shards of tokens, look at a row, verify and count shards.")


class Split(StrEnum):
    """The two parts of the data."""

    train = "train"
    validation = "validation"


InputsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE KEY=VALUE | PATH",
        help="A recipe; or, with --out, texts: files (also JSONL, .gz, .zst, Parquet), folders, globs, stdlib.",
        show_default=False,
    ),
]
OutOption = Annotated[Path | None, typer.Option(help="Folder for the shards; must not exist yet.")]
ShareOption = Annotated[float | None, typer.Option(help="With --out: share of documents held out (0.03 unless given).")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="With --out: byte (unless given), a tokenizer.json or a SentencePiece *.model.")
]
EndOption = Annotated[
    int | None, typer.Option(min=0, help="With --out: id that ends a document (the tokenizer's own unless given).")
]
DeduplicateOption = Annotated[
    bool, typer.Option("--deduplicate", help="With --out: leave out documents equal to an earlier one.")
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
    deduplicate: DeduplicateOption = False,
    processes: ProcessesOption = None,
    from_model: own_text_verbs.FromModelOption = None,
    prompts: own_text_verbs.PromptsOption = None,
    num_documents: own_text_verbs.CountOption = 1000,
    max_new_tokens: own_text_verbs.NewTokensOption = 256,
    temperature: own_text_verbs.TemperatureOption = 0.6,
    top_k: own_text_verbs.TopKOption = 20,
    top_p: own_text_verbs.TopPOption = 0.95,
    prompt_tokens: own_text_verbs.PromptTokensOption = 32,
    learn_prompts: own_text_verbs.LearnPromptsOption = False,
    seed: own_text_verbs.SeedOption = 0,
    rows: own_text_verbs.RowsOption = 16,
    device: own_text_verbs.OwnDeviceOption = DeviceName.auto,
) -> None:
    """Build shards: of a recipe's corpus into its cache, of any texts, or of what a model writes, into a folder."""
    share = _share_of(validation_fraction)
    if from_model is not None:
        request = own_text_verbs.Request(
            model=from_model,
            prompts=prompts,
            num_documents=num_documents,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            prompt_tokens=prompt_tokens,
            train_on_prompt=learn_prompts,
            seed=seed,
            batch_rows=rows,
            device=device,
            validation_fraction=share,
        )
        if out is None or inputs:
            raise typer.BadParameter("needs --out, and prompts in place of texts", param_hint="--from-model")
        own_text_verbs.build_from_model(request, out)
        return
    if not inputs:
        raise typer.BadParameter("give a recipe, texts, or --from-model", param_hint="PATH")
    if out is None:
        given = (validation_fraction, tokenizer, end_of_document, processes)
        _build_of_recipe(inputs, is_for_texts=deduplicate or any(option is not None for option in given))
        return
    from mtp_lightning.data.shards.build import BuildOptions, build_shards

    options = BuildOptions(
        tokenizer=tokenizer or "byte",
        end_of_document=end_of_document,
        validation_fraction=share,
        deduplicate=deduplicate,
    )
    build_shards(inputs, out, options, processes=processes)


def _share_of(given: float | None) -> float:
    """Return the share of documents that is held out."""
    from mtp_lightning.recipe.schema.data import DataSection

    share = DataSection().validation_fraction if given is None else given
    if not 0 < share < 1:
        raise typer.BadParameter("must lie between 0 and 1", param_hint="--validation-fraction")
    return share


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
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the lengths into this file, too.")] = None,
) -> None:
    """Count documents and tokens by folder and source, and show how long the documents are."""
    from mtp_lightning.data.shards.stats import show_statistics

    show_statistics(folders, picture=picture)
