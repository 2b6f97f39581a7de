"""`mtp bench memory | train | overhead | data | decode | tree`."""

import os
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from mtp_lightning.cli import bench as decode_bench_verbs
from mtp_lightning.cli.generate import (
    DeviceName,
    DeviceOption,
    DtypeName,
    DtypeOption,
    ModelArgument,
    PromptsOption,
    device_of,
    dtype_of,
)
from mtp_lightning.cli.prompts import read_prompts
from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument, open_recipe
from mtp_lightning.cli.targets import JsonOption, check_file, check_picture


def decode(
    path: ModelArgument,
    *,
    prompts: PromptsOption = None,
    batches: Annotated[str, typer.Option(metavar="B,B,...", help="Batches to measure.")] = "1,4,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, at most.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure.")] = 3,
    compile: Annotated[
        bool, typer.Option("--compile", help="Measure compiled steps, too; each way takes a minute or so to compile.")
    ] = False,
    json: JsonOption = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", callback=check_picture, help="Draw the figures here.")
    ] = None,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
) -> None:
    """Measure what drafting gains: plain greedy against every decoder, draft length and batch."""
    sizes = _sizes(batches)
    texts = None if prompts is None else read_prompts(prompts)
    from mtp_lightning.bench.decoding.compare import bench_decode
    from mtp_lightning.bench.decoding.report import DecodePlan

    plan = DecodePlan(batches=sizes, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, compile=compile)
    bench_decode(
        path, plan, prompts=texts, device=device_of(device), dtype=dtype_of(dtype), json_path=json, png_path=png
    )


def tree(
    path: ModelArgument,
    *,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", callback=check_file, help="Write the tree here, as JSON.", show_default=False),
    ],
    drafts: Annotated[int, typer.Option(min=1, max=64, help="Nodes of the tree.")] = 16,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
) -> None:
    """Measure how often each choice of each offset is right on held-out text, and grow a tree of drafts from it."""
    from mtp_lightning.bench.decoding.trees import bench_tree

    bench_tree(path, out, num_drafts=drafts, device=device_of(device), dtype=dtype_of(dtype))


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise typer.BadParameter(
            f"must be whole numbers >= 1 with commas between; found {text!r}", param_hint="--batches"
        )
    return sorted({int(part) for part in parts})


app = typer.Typer(no_args_is_help=True, help="Measure training, decoding and loading.")

OffsetsOption = Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of offsets to measure.")]
BackwardOrdersOption = Annotated[str, typer.Option(metavar="NAME,...", help="Backward orders to measure.")]


@app.command()
def memory(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    offsets: OffsetsOption = "1,2,4,8",
    backward_orders: BackwardOrdersOption = "sequential,joint",
    json: JsonOption = None,
) -> None:
    """Measure the peak memory of a training step, for several numbers of offsets and backward orders."""
    numbers, names = _offsets(offsets), _backward_orders(backward_orders)
    loaded = open_recipe(recipe, overrides)
    from mtp_lightning.bench.training.memory import bench_memory

    bench_memory(loaded.recipe, offsets=numbers, backward_orders=names, json_path=json)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    offsets: OffsetsOption = "1,2,4,8",
    backward_orders: BackwardOrdersOption = "sequential,joint",
    json: JsonOption = None,
) -> None:
    """Measure the speed of training, for several numbers of offsets and backward orders."""
    numbers, names = _offsets(offsets), _backward_orders(backward_orders)
    loaded = open_recipe(recipe, overrides)
    from mtp_lightning.bench.training.speed import bench_train

    bench_train(loaded.recipe, offsets=numbers, backward_orders=names, json_path=json)


@app.command()
def plain(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of steps, one of each loop.")] = 6,
    json: JsonOption = None,
) -> None:
    """Measure a training step against a plain loop over transformers' own model, at one offset."""
    loaded = open_recipe(recipe, overrides)
    from mtp_lightning.bench.training.plain import bench_plain

    bench_plain(loaded.recipe, pairs=pairs, json_path=json)


@app.command()
def overhead(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of rounds, with the callbacks and without.")] = 10,
    round_steps: Annotated[int, typer.Option(min=2, help="Steps of a round.")] = 10,
    json: JsonOption = None,
) -> None:
    """Measure what watchdog, polling for signals and timing of ranks cost, as a share of a step."""
    loaded = open_recipe(recipe, overrides)
    from mtp_lightning.launch.local import needs_ranks, run_ranks

    if needs_ranks(loaded.recipe, os.environ):
        raise typer.Exit(run_ranks(loaded.recipe, sys.argv[1:]))
    from mtp_lightning.bench.training.overhead import bench_overhead

    bench_overhead(loaded.recipe, pairs=pairs, round_steps=round_steps, json_path=json)


app.command()(decode_bench_verbs.decode)
app.command()(decode_bench_verbs.tree)


@app.command()
def data(
    *,
    text_mb: Annotated[int, typer.Option(min=1, help="Megabytes of text to make up and build from.")] = 64,
    tokenizer: Annotated[str | None, typer.Option(help="Measure building with this tokenizer, too.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Passes over the rows, of which the median counts.")] = 5,
    json: JsonOption = None,
) -> None:
    """Measure reading and building of shards on one core, rows against np.memmap."""
    from mtp_lightning.bench.data_loading import bench_data

    bench_data(text_mb=text_mb, tokenizer=tokenizer, repeats=repeats, json_path=json)


def _offsets(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise typer.BadParameter(
            f"must be whole numbers >= 1 with commas between; found {text!r}", param_hint="--offsets"
        )
    return [int(part) for part in parts]


def _backward_orders(text: str) -> list[str]:
    from mtp_lightning.recipe.schema.objective import ObjectiveSection

    known = get_args(ObjectiveSection.model_fields["backward_order"].annotation)
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(
            f"must be among {', '.join(known)}; found {unknown[0]!r}", param_hint="--backward-orders"
        )
    return names
