"""`mtp bench decode | tree`."""

from pathlib import Path
from typing import Annotated

import typer

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
from mtp_lightning.cli.prompt_files import read_prompts


def decode(
    path: ModelArgument,
    *,
    prompts: PromptsOption = None,
    batches: Annotated[str, typer.Option(metavar="B,B,...", help="Batches to measure.")] = "1,4,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, at most.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure.")] = 3,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, too.")] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the figures here.")] = None,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
) -> None:
    """Measure what drafting gains: plain greedy against every decoder, draft length and batch."""
    sizes = _sizes(batches)
    texts = None if prompts is None else read_prompts(prompts)
    from mtp_lightning.bench.decoding.compare import bench_decode
    from mtp_lightning.bench.decoding.report import DecodePlan

    plan = DecodePlan(batches=sizes, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    bench_decode(
        path, plan, prompts=texts, device=device_of(device), dtype=dtype_of(dtype), json_path=json, png_path=png
    )


def tree(
    path: ModelArgument,
    *,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write the tree here, as JSON.", show_default=False)],
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
