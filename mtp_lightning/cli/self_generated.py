"""`mtp data build --from-model`: shards of what a model writes itself."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_lightning.cli.generate import DeviceName

if TYPE_CHECKING:
    from collections.abc import Generator

    from mtp_lightning.data.generated.half_written import Setting
    from mtp_lightning.data.generated.log import TextLog
    from mtp_lightning.data.generated.shards import TokenDocument
    from mtp_lightning.data.tokenizers.base import Tokenizer
    from mtp_lightning.recipe import Recipe

FromModelOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="With --out: a run, checkpoint or export whose own text is to be the documents. After a kill, the same "
        "command goes on with what was written.",
    ),
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
    train_on_prompt: bool
    seed: int
    batch_rows: int
    device: DeviceName
    validation_fraction: float


def build_from_model(request: Request, out: Path) -> None:
    """Let a model write documents, and make shards of them; go on where an equal command was ended."""
    if request.prompts is None:
        raise typer.BadParameter("--from-model needs prompts to begin with", param_hint="--prompts")
    from mtp_lightning.checkpoint.convert.load_model import find_checkpoint
    from mtp_lightning.console.progress import say
    from mtp_lightning.data.generated.shards import TokenShards, write_token_shards
    from mtp_lightning.data.loading.corpus import recipe_tokenizer
    from mtp_lightning.data.shards.build import describe

    folder = find_checkpoint(request.model)
    recipe, digest = _identified(folder)
    tokenizer = recipe_tokenizer(recipe)
    prompts = _prompts_of(request, tokenizer)
    settings = _settings_of(request, model=f"{folder.name} of sha256 {digest[:16]}", prompts=prompts)
    made = TokenShards(tokenizer=tokenizer, request=settings, validation_fraction=request.validation_fraction)
    manifest = write_token_shards(lambda log: _documents(request, folder, prompts, tokenizer, log), out, made)
    if manifest is None:
        say(f"{out} has been built from this model with these settings before")
        return
    say(f"built {describe(manifest)}: {out}")
    if sum(shard.num_documents for shard in manifest.shards) < request.num_documents:
        say(f"{request.num_documents:,} documents were asked for: give more prompts, or a higher temperature")


def _documents(
    request: Request, folder: Path, prompts: list[list[int]], tokenizer: "Tokenizer", log: "TextLog"
) -> "Generator[TokenDocument, None, None]":
    """Load the model and let it write."""
    from mtp_lightning.checkpoint.convert.load_model import load_model
    from mtp_lightning.cli.generate import device_of
    from mtp_lightning.console.progress import counted, say
    from mtp_lightning.decode import Settings
    from mtp_lightning.decode.self_generated import OwnText, Writer, check_share

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
        train_on_prompt=request.train_on_prompt,
    )
    writer = Writer(load_model(folder, device=device_of(request.device))[1], prompts, wanted)
    check_share(len(prompts), request.validation_fraction)
    with counted("writing", total=request.num_documents, unit="documents") as advance:
        yield from writer.documents(log, advance)
    say(f"{writer.num_duplicates:,} duplicates left out")


def _identified(folder: Path) -> "tuple[Recipe, str]":
    """Read the recipe of a model, and a digest over all that the model consists of, without reading the weights."""
    from mtp_lightning.checkpoint.convert.load_model import model_files, offering_another
    from mtp_lightning.checkpoint.format.layout import check_digests
    from mtp_lightning.checkpoint.format.manifest import RECIPE_NAME
    from mtp_lightning.recipe import load_recipe

    with offering_another(folder):
        files = model_files(folder)
        check_digests(folder, {RECIPE_NAME: files[RECIPE_NAME]})
    listing = "\n".join(f"{name} {record.sha256}" for name, record in sorted(files.items()))
    return load_recipe(folder / RECIPE_NAME).recipe, hashlib.sha256(listing.encode()).hexdigest()


def _settings_of(request: Request, *, model: str, prompts: list[list[int]]) -> "dict[str, Setting]":
    """List all that decides what is written, under the names of the options."""
    from mtp_lightning.cli.generate import device_of

    assert request.prompts is not None
    is_sampled = request.temperature > 0
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {
        "--from-model": model,
        "--prompts": f"{len(prompts):,} of sha256 {digest[:16]}",
        "--prompt-tokens": request.prompt_tokens if request.prompts.is_dir() else None,
        "--num-documents": request.num_documents,
        "--max-new-tokens": request.max_new_tokens,
        "--temperature": request.temperature,
        "--top-k": request.top_k if is_sampled else None,
        "--top-p": request.top_p if is_sampled else None,
        "--learn-prompts": request.train_on_prompt,
        "--seed": request.seed,
        "--rows": request.batch_rows,
        "--device": device_of(request.device).type,
    }


def _prompts_of(request: Request, tokenizer: "Tokenizer") -> list[list[int]]:
    """Read the prompts as tokens."""
    from mtp_lightning.cli.prompt_files import read_prompts
    from mtp_lightning.data.generated.shards import beginnings

    assert request.prompts is not None
    if request.prompts.is_dir():
        return list(beginnings(request.prompts, request.prompt_tokens))
    return [tokens.tolist() for tokens in tokenizer.encode_many(read_prompts(request.prompts))]
