"""`mtp eval harness`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtp_lightning.cli.generate import DeviceName, DeviceOption, DtypeName, DtypeOption, ModelArgument
from mtp_lightning.cli.targets import JsonOption
from mtp_lightning.console.errors import finish_without_output


def harness(
    path: ModelArgument,
    *,
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="Tasks, groups or task files, with commas; * matches many.")
    ],
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of task files of your own.", show_default=False)
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Documents per task; below 1, the share of them.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question.", show_default=False)
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Rows of a batch.")] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Write questions by the model's own chat template.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What stands before every question.", show_default=False)
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,...", help="Settings of generation, before the tasks' own.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of texts that are drawn.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write lm-eval's files of results and samples here.", show_default=False),
    ] = None,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
    json_path: JsonOption = None,
) -> None:
    """Run tasks of lm-evaluation-harness (extra eval); the heads draft, and figures are those of its own classes."""
    rows = _batch_size(batch_size)
    if out is not None:
        finish_without_output()

    from mtp_lightning.cli.generate import device_of, dtype_of
    from mtp_lightning.console.progress import say
    from mtp_lightning.console.tables import write_json
    from mtp_lightning.evaluation.harness import HarnessModel
    from mtp_lightning.evaluation.harness_tasks import evaluate_tasks, parse_gen_kwargs, plain, tables_of

    settings = parse_gen_kwargs(gen_kwargs)
    model = HarnessModel(path, device=device_of(device), dtype=dtype_of(dtype), batch_size=rows, seed=seed)
    results = evaluate_tasks(
        model,
        [name.strip() for name in tasks.split(",") if name.strip()],
        include_path=include_path,
        out=out,
        chat=chat,
        gen_kwargs=settings,
        limit=limit,
        num_fewshot=num_fewshot,
        system_instruction=system,
        tell=lambda results: say(tables_of(results)),
    )
    if (drafting := model.drafting()) is not None:
        say(f"{drafting:.2f} tokens per forward, by drafts that change no text")
    write_json(json_path, plain(results))


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(
            f"must be a whole number from 1 on, or auto; found {text!r}", param_hint="--batch-size"
        )
    return int(text)
