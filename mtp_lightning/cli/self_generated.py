"""`mtp data generate`: shards of what a model writes itself."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mtp_lightning.cli.generate import ChatOption, DeviceName, SpecialTokensOption, SystemOption, device_of
from mtp_lightning.console.errors import finish_without_output

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch

    from mtp_lightning.checkpoint.format.folder import CheckpointFolder
    from mtp_lightning.data.generated.log import Setting, TextLog
    from mtp_lightning.data.generated.shards import TokenDocument, TokenShards, WriteTexts
    from mtp_lightning.data.tokenizers.base import Tokenizer
    from mtp_lightning.decode.self_generated import OwnText
    from mtp_lightning.recipe import Recipe

PromptsOption = Annotated[
    Path,
    typer.Option(
        metavar="FILE|FOLDER",
        help="Prompts, one per line or *.jsonl with `prompt`; or shards, whose documents' first tokens are taken.",
        show_default=False,
    ),
]


def generate(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Run, checkpoint or exported folder whose own text is to be the documents.",
            show_default=False,
        ),
    ],
    *,
    prompts: PromptsOption,
    chat: ChatOption = False,
    system: SystemOption = None,
    special_tokens: SpecialTokensOption = False,
    out: Annotated[Path, typer.Option(help="Folder for the shards; must not exist yet.", show_default=False)],
    num_documents: Annotated[int, typer.Option(metavar="N", min=1, help="How many, no two equal.")] = 1000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.6,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest tokens.")] = 20,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that hold this share.")] = 0.95,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="With --prompts FOLDER: tokens of each document.")] = 32,
    learn_prompts: Annotated[bool, typer.Option("--learn-prompts", help="Let prompts be targets, too.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Texts that are generated together.")] = 16,
    device: Annotated[DeviceName, typer.Option(help="auto takes CUDA when there is one.")] = DeviceName.auto,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of documents held out (0.03 unless given).")
    ] = None,
) -> None:
    """Let a model write documents, and make shards of them; after a kill, the same command goes on."""
    from mtp_lightning.checkpoint.format.folder import open_checkpoint
    from mtp_lightning.data.generated.shards import TokenShards
    from mtp_lightning.data.loading.corpus import recipe_tokenizer
    from mtp_lightning.decode import Settings
    from mtp_lightning.decode.self_generated import OwnText

    finish_without_output()
    folder = open_checkpoint(model, verify=False)  # in full before it is loaded: all may be there already
    tokenizer = recipe_tokenizer(folder.recipe)
    reading = _Reading(chat=chat, system=system, special_tokens=special_tokens, num_tokens=prompt_tokens)
    tokens = _prompts_of(prompts, folder.recipe, tokenizer, reading)
    wanted = OwnText(
        num_documents=num_documents,
        settings=Settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k if temperature else None,
            top_p=top_p if temperature else None,
            seed=seed,
            stop_tokens=_end_ids_of(folder, tokenizer),
            draft_length="adaptive" if folder.recipe.heads.num_offsets > 1 else None,  # heads may know nothing yet
        ),
        end_of_document=tokenizer.end_of_document,
        batch_rows=rows,
        train_on_prompt=learn_prompts,
        validation_fraction=share_of(validation_fraction),
    )
    decisive = {
        **context.params,
        "prompt_tokens": prompt_tokens if prompts.is_dir() else None,
        "top_k": wanted.settings.top_k,
        "top_p": wanted.settings.top_p,
        "device": device_of(device).type,
    }
    request = _request(folder.model_name, tokens, decisive)
    made = TokenShards(tokenizer=tokenizer, request=request, validation_fraction=wanted.validation_fraction)
    _build(out, made, wanted, lambda log: _documents(folder, tokens, wanted, log, device_of(device)))


def _build(out: Path, made: "TokenShards", wanted: "OwnText", write: "WriteTexts") -> None:
    """Write the shards, and say what they hold."""
    from mtp_lightning.console.progress import say
    from mtp_lightning.data.generated.shards import write_token_shards
    from mtp_lightning.data.shards.manifest import describe

    manifest = write_token_shards(write, out, made)
    if manifest is None:
        say(f"{out} has been built from this model with these settings before")
        return
    say(f"built {describe(manifest)}: {out}")
    if sum(shard.num_documents for shard in manifest.shards) < wanted.num_documents:
        say(f"{wanted.num_documents:,} documents were asked for: give more prompts, or a higher temperature")


def _end_ids_of(folder: "CheckpointFolder", tokenizer: "Tokenizer") -> list[int]:
    from mtp_lightning.checkpoint.format.carried_files import all_end_ids

    return all_end_ids(folder.recipe, tokenizer.end_of_document, folder.path)


def share_of(given: float | None) -> float:
    """Return the share of documents that is held out."""
    from mtp_lightning.recipe.schema.data import DataSection

    share = DataSection().validation_fraction if given is None else given
    if not 0 < share < 1:
        raise typer.BadParameter("must lie between 0 and 1", param_hint="--validation-fraction")
    return share


def _request(model: str, prompts: list[list[int]], options: dict[str, Any]) -> "dict[str, Setting]":
    """List all that decides what is written, under the names of the options."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    left_out = ("model", "prompts", "chat", "system", "special_tokens", "out", "validation_fraction")
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items() if name not in left_out}
    return {"MODEL": model, "--prompts": f"{len(prompts):,} of sha256 {digest[:16]}", **named}


def _documents(
    folder: "CheckpointFolder", prompts: list[list[int]], wanted: "OwnText", log: "TextLog", device: "torch.device"
) -> "Generator[TokenDocument, None, None]":
    """Load the model and let it write."""
    from mtp_lightning.checkpoint.convert.load_model import build_trained
    from mtp_lightning.console.progress import counted, say
    from mtp_lightning.decode.packed_linear import pack_linear_maps
    from mtp_lightning.decode.self_generated import Writer

    folder.verify()
    writer = Writer(pack_linear_maps(build_trained(folder, device=device)), prompts, wanted)
    with counted("writing", total=wanted.num_documents, unit="documents") as advance:
        yield from writer.documents(log, advance)
    say(f"{writer.num_duplicates:,} duplicates left out")


class _Reading(NamedTuple):
    """How prompts become tokens; `num_tokens` of those in shards."""

    chat: bool
    system: str | None
    special_tokens: bool
    num_tokens: int


def _prompts_of(path: Path, recipe: "Recipe", tokenizer: "Tokenizer", reading: _Reading) -> list[list[int]]:
    """Read the prompts as tokens."""
    from mtp_lightning.cli.prompts import encode_prompts, read_chats, read_prompts
    from mtp_lightning.data.generated.shards import beginnings

    if reading.system is not None and not reading.chat:
        raise typer.BadParameter("needs --chat", param_hint="--system")
    if path.is_dir():
        if reading.chat or reading.special_tokens:
            option = "--chat" if reading.chat else "--special-tokens"
            raise typer.BadParameter("needs --prompts FILE: those of shards are tokens already", param_hint=option)
        return list(beginnings(path, reading.num_tokens))
    texts = read_chats(path, reading.system) if reading.chat else read_prompts(path)
    encoded = encode_prompts(recipe, tokenizer, texts, parse_special_tokens=reading.special_tokens)
    return [prompt.tokens for prompt in encoded]
