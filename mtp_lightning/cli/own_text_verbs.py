"""`mtp data build --from-model`: shards of what a model writes itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_lightning.cli.generate_verbs import DeviceName

if TYPE_CHECKING:
    from mtp_lightning.data.tokenizers import Tokenizer

FromModelOption = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="With --out: a run, checkpoint or export whose own text is to be the documents."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|FOLDER",
        help="With --from-model: prompts, one per line or *.jsonl with `prompt`; or shards, whose documents' first "
        "tokens are taken.",
    ),
]
CountOption = Annotated[int, typer.Option(metavar="N", min=1, help="With --from-model: how many, no two equal.")]
NewTokensOption = Annotated[int, typer.Option(min=1, help="With --from-model: longest continuation.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="With --from-model: 0 takes the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="With --from-model: draw among the k likeliest tokens.")]
TopPOption = Annotated[
    float | None, typer.Option(help="With --from-model: draw among the likeliest tokens that hold this share.")
]
PromptTokensOption = Annotated[int, typer.Option(min=1, help="With --prompts FOLDER: tokens of each document.")]
LearnPromptsOption = Annotated[
    bool, typer.Option("--learn-prompts", help="With --from-model: let prompts be targets, too.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="With --from-model: seed of what is drawn.")]
RowsOption = Annotated[int, typer.Option(min=1, help="With --from-model: texts that are written together.")]
OwnDeviceOption = Annotated[DeviceName, typer.Option(help="With --from-model: auto takes CUDA when there is one.")]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line says."""

    model: Path
    prompts: Path | None
    num_documents: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    prompt_tokens: int
    learns_prompts: bool
    seed: int
    batch_rows: int
    device: DeviceName
    validation_share: float


def build_from_model(request: Request, out: Path) -> None:
    """Let a model write documents, and make shards of them."""
    if request.prompts is None:
        raise typer.BadParameter("--from-model needs prompts to begin with", param_hint="--prompts")
    from mtp_lightning.checkpoint.loading import load_model
    from mtp_lightning.cli.generate_verbs import device_of
    from mtp_lightning.data.build import describe
    from mtp_lightning.data.corpus import recipe_tokenizer
    from mtp_lightning.data.progress import counted, say
    from mtp_lightning.data.token_shards import TokenShards, check_new, write_token_shards
    from mtp_lightning.decode import Settings
    from mtp_lightning.decode.own_text import OwnText, Writer

    check_new(out)
    recipe, model = load_model(request.model, device=device_of(request.device))
    tokenizer = recipe_tokenizer(recipe)
    settings = Settings(
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k if request.temperature else None,
        top_p=request.top_p if request.temperature else None,
        seed=request.seed,
        stop_tokens=[tokenizer.end_of_document],
    )
    wanted = OwnText(
        num_documents=request.num_documents,
        settings=settings,
        end_of_document=tokenizer.end_of_document,
        batch_rows=request.batch_rows,
        learns_prompts=request.learns_prompts,
    )
    writer = Writer(model, _prompts_of(request, tokenizer), wanted)
    made = TokenShards(
        tokenizer=tokenizer, source=f"{request}", validation_share=request.validation_share
    )
    with counted("writing", total=request.num_documents, unit="documents") as advance:
        manifest = write_token_shards(writer.documents(advance), out, made)
    num_made = manifest.num_documents("train") + manifest.num_documents("validation")
    say(f"built {describe(manifest)}, {writer.num_duplicates:,} duplicates left out: {out}")
    if num_made < request.num_documents:
        say(f"{request.num_documents:,} documents were asked for: give more prompts, or a higher temperature")


def _prompts_of(request: Request, tokenizer: "Tokenizer") -> list[list[int]]:
    """Read the prompts as tokens."""
    from mtp_lightning.cli.prompt_files import read_prompts
    from mtp_lightning.data.token_shards import beginnings

    assert request.prompts is not None
    if request.prompts.is_dir():
        return list(beginnings(request.prompts, request.prompt_tokens))
    return [tokens.tolist() for tokens in tokenizer.encode_many(read_prompts(request.prompts))]
