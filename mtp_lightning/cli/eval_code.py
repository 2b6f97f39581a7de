"""`mtp eval code`: programs that a model writes, and how many of them pass their tests."""

import json
import math
import os
from collections import Counter
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_lightning.cli.generate import (
    ADAPTIVE,
    ChatOption,
    DecoderName,
    DecoderOption,
    DeviceName,
    DeviceOption,
    DraftLengthOption,
    DtypeName,
    DtypeOption,
    ModelArgument,
    device_of,
    dtype_of,
    parse_draft_length,
)
from mtp_lightning.cli.prompts import encode_prompts
from mtp_lightning.cli.targets import JsonOption
from mtp_lightning.console.errors import finish_without_output, screen, table_of
from mtp_lightning.console.progress import counted, say
from mtp_lightning.console.tables import write_json
from mtp_lightning.files.durable import describe_file, replace_durably

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from mtp_lightning.checkpoint.format.folder import CheckpointFolder
    from mtp_lightning.decode import Settings
    from mtp_lightning.evaluation.code.problems import Problem
    from mtp_lightning.evaluation.code.sample import Wanted
    from mtp_lightning.evaluation.code.samples import LineLog
    from mtp_lightning.evaluation.code.sandbox import Sandbox
    from mtp_lightning.model.mtp_model import MtpModel

RESULTS = "results.json"
DECISIVE = (
    *("samples", "temperatures", "top_p", "max_new_tokens", "chat", "limit", "rows", "seed", "decoder"),
    *("draft_length", "device", "dtype"),
)
"""Options that decide what is written."""


def code(
    context: typer.Context,
    path: ModelArgument,
    *,
    tasks: Annotated[str, typer.Option(metavar="TASK,...", help="humaneval, mbpp, apps, codecontests.")],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="The file of each task, in their order; JSON lines.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Samples and verdicts; after a kill it is gone on with.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples per problem at each temperature above 0.")] = 1,
    temperatures: Annotated[str, typer.Option(metavar="T,...", help="0 takes the likeliest token.")] = "0",
    k: Annotated[str, typer.Option(metavar="K,...", help="Count pass@k for these, up to --samples.")] = "1,10,100",
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that hold this share.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    chat: ChatOption = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems of each task.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Samples that are generated together.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    decoder: DecoderOption = DecoderName.auto,
    draft_length: DraftLengthOption = None,
    execute: Annotated[bool, typer.Option("--execute", help="Run the programs, in a sandbox, and count.")] = False,
    weak_sandbox: Annotated[
        bool, typer.Option("--weak-sandbox", help="Run them without namespaces, where the kernel permits none.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for all tests of a sample, or a program's run.")
    ] = 10,
    workers: Annotated[int | None, typer.Option(min=1, help="Sandboxes at once; one per core unless given.")] = None,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
    json_path: JsonOption = None,
) -> None:
    """Let a model write programs, its heads drafting, and count how many pass their tests: pass@k."""
    if weak_sandbox and not execute:
        raise typer.BadParameter("needs --execute", param_hint="--weak-sandbox")
    finish_without_output()
    kinds, heats, counts = _tasks(tasks, data), _temperatures(temperatures, samples), _counts(k, samples)

    from mtp_lightning.checkpoint.format.folder import open_checkpoint
    from mtp_lightning.evaluation.code.problems import read_problems
    from mtp_lightning.evaluation.code.samples import SAMPLE, SAMPLES, VERDICT, VERDICTS, LineLog, own_folder
    from mtp_lightning.evaluation.code.sandbox import Limits, Sandbox

    sandbox = Sandbox(Limits(seconds=timeout), weak=weak_sandbox) if execute else None
    problems = {task: read_problems(task, file)[:limit] for task, file in zip(kinds, data, strict=True)}
    model = _Model(open_checkpoint(path, verify=False), device, dtype)
    settings = model.settings(max_new_tokens, decoder, parse_draft_length(draft_length), seed)
    wanted = {
        task: model.wanted(
            task, own, settings, chat=chat, temperatures=heats, num_samples=samples, top_p=top_p, rows=rows
        )
        for task, own in problems.items()
    }
    if sandbox is None:
        say("Without --execute samples are written, and no program is run")
    results = {}
    for (task, own), file in zip(problems.items(), data, strict=True):
        digest = describe_file(file, is_synced=True).sha256
        request = {**_decisive(context.params), "PATH": model.folder.sha256, "--data": digest}
        with own_folder(out / task, request), LineLog(out / task / SAMPLES, SAMPLE) as log:
            results[task] = {"problems": len(own), **_written(model, wanted[task], log), "samples": len(log.lines)}
            if sandbox is not None:
                with LineLog(out / task / VERDICTS, VERDICT) as verdicts:
                    _judge(task, own, log, verdicts, sandbox, is_chat=chat, workers=workers)
                    results[task] |= _scored(task, verdicts, counts)
    if sandbox is None:
        say(f"samples are in {out}; nothing was run: the same command with --execute runs and counts them")
    else:
        replace_durably(out / RESULTS, json.dumps(results, indent=2).encode() + b"\n")
    write_json(json_path, results)


class _Model:
    """A model, which is loaded when something is to be written."""

    def __init__(self, folder: "CheckpointFolder", device: DeviceName, dtype: DtypeName) -> None:
        from mtp_lightning.data.loading.corpus import recipe_tokenizer

        self.folder, self.tokenizer = folder, recipe_tokenizer(folder.recipe)
        self.device, self.dtype = device_of(device), dtype_of(dtype)

    @cached_property
    def built(self) -> "MtpModel":
        """The model itself."""
        from mtp_lightning.checkpoint.convert.load_model import build_trained
        from mtp_lightning.decode.packed_linear import pack_linear_maps

        self.folder.verify()
        return pack_linear_maps(build_trained(self.folder, device=self.device, dtype=self.dtype))

    def settings(
        self, max_new_tokens: int, decoder: DecoderName, length: "int | Literal['adaptive'] | None", seed: int
    ) -> "Settings":
        """Say how to decode, but for what differs between samples; as many drafts as pay, unless said otherwise."""
        from mtp_lightning.checkpoint.format.carried_files import all_end_ids
        from mtp_lightning.decode import Settings

        recipe = self.folder.recipe
        can_draft = recipe.heads.num_offsets > 1 and decoder not in (DecoderName.greedy, DecoderName.tree)
        return Settings(
            max_new_tokens=max_new_tokens,
            decoder=decoder.value,
            draft_length=length or (ADAPTIVE if can_draft else None),
            stop_tokens=all_end_ids(recipe, self.tokenizer.end_of_document, self.folder.path),
            seed=seed,
        )

    def wanted(
        self, task: str, problems: "Sequence[Problem]", settings: "Settings", *, chat: bool, **given: Any
    ) -> "Wanted":
        """Encode the prompts of a task.

        Raises:
            DecodingError: They leave no room in the context, or there is no chat template.
        """
        from mtp_lightning.evaluation.code.sample import Wanted

        texts: list[Any] = [problem.prompt.encode() for problem in problems]
        if chat:
            texts = [[{"role": "user", "content": problem.request}] for problem in problems]
        prompts = encode_prompts(self.folder.recipe, self.tokenizer, texts)
        wanted = Wanted(
            task=task,
            prompts={problem.name: prompt.tokens for problem, prompt in zip(problems, prompts, strict=True)},
            stop_strings=() if chat else problems[0].stop_strings,
            settings=settings,
            **given,
        )
        wanted.check_context(self.folder.recipe.model.max_position_embeddings)
        return wanted


def _decisive(options: dict[str, Any]) -> dict[str, Any]:
    """List the options that decide what is written, as a user names them."""
    return {f"--{name.replace('_', '-')}": value for name, value in options.items() if name in DECISIVE}


def _written(model: _Model, wanted: "Wanted", log: "LineLog") -> dict[str, Any]:
    """Write what is not there; say how fast that was, and return it as figures."""
    from mtp_lightning.evaluation.code.sample import num_done, write_samples

    batches = wanted.batches()
    left = batches[num_done(log, batches) :]
    if not left:
        return {}
    if log.lines:
        say(f"{wanted.task}: going on after {len(log.lines):,} samples of an evaluation that was ended")
    with counted(f"{wanted.task}, writing", total=sum(map(len, left)), unit="samples") as advance:
        speed = write_samples(model.built, model.tokenizer, wanted, log, advance)
    line = f"{speed.num_tokens:,} tokens in {speed.seconds:,.1f} s, {speed.num_tokens / speed.seconds:,.0f} tokens/s"
    if speed.gain is not None:
        line += f"; acceptance length {speed.mean_acceptance_length:.2f}"
        line += f"; the first batch {speed.gain:.2f} times as fast as without drafts"
        if speed.is_same is not None:
            line += f", {'the same' if speed.is_same else 'not the same'} texts"
    say(line)
    return asdict(speed)


def _judge(
    task: str,
    problems: "Sequence[Problem]",
    log: "LineLog",
    verdicts: "LineLog",
    sandbox: "Sandbox",
    *,
    is_chat: bool,
    workers: int | None,
) -> None:
    from mtp_lightning.evaluation.code.score import judge

    left = len(log.lines) - len(verdicts.lines)
    with counted(f"{task}, running", total=left, unit="programs") as advance:
        judge(
            {problem.name: problem for problem in problems},
            log.lines,
            verdicts,
            sandbox,
            is_chat=is_chat,
            workers=workers or len(os.sched_getaffinity(0)),
            advance=advance,
        )


def _scored(task: str, verdicts: "LineLog", counts: list[int]) -> dict[str, Any]:
    """Print the figures of a task, and return them."""
    from mtp_lightning.evaluation.code.score import best, figures, passes

    passed = passes(verdicts.lines)
    found = figures(passed, counts)
    chosen = best(found)
    table = table_of(["", "temperature", "samples", "passed", "95 % interval", ""], left=0)
    for figure in sorted(found, key=lambda one: (one.k, one.temperature)):
        num_samples = min(map(len, passed[figure.temperature]))
        mark = "best" if figure in chosen and len(passed) > 1 else ""
        interval = f"{figure.low:.1%} to {figure.high:.1%}"
        heat = f"{figure.temperature:g}"
        table.add_row(f"pass@{figure.k}", heat, f"{num_samples:,}", f"{figure.value:.1%}", interval, mark)
    screen().print(f"{task}, {len(next(iter(passed.values()))):,} problems")
    screen().print(table)
    outcomes = Counter(line["outcome"] for line in verdicts.lines)
    say(", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())))
    return {"pass_at_k": [asdict(one) for one in found], "best": [asdict(one) for one in chosen], **outcomes}


def _tasks(text: str, data: list[Path]) -> list[str]:
    from mtp_lightning.evaluation.code.problems import TASKS

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS or names.count(name) > 1:
            raise typer.BadParameter(
                f"must be among {', '.join(TASKS)}, each once; found {text!r}", param_hint="--tasks"
            )
    if len(names) != len(data):
        raise typer.BadParameter(
            f"must name one file for each of {', '.join(names)}; found {len(data)}", param_hint="--data"
        )
    return names


def _temperatures(text: str, samples: int) -> list[float]:
    try:
        heats = sorted({float(part) for part in text.split(",")})
    except ValueError:
        heats = []
    if not heats or not all(0 <= heat < math.inf for heat in heats):
        raise typer.BadParameter(f"must be numbers from 0 on; found {text!r}", param_hint="--temperatures")
    if heats == [0] and samples > 1:
        raise typer.BadParameter("above 1 needs --temperatures above 0: at 0 all are equal", param_hint="--samples")
    return heats


def _counts(text: str, samples: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise typer.BadParameter(f"must be whole numbers >= 1; found {text!r}", param_hint="--k")
    if min(map(int, parts)) > samples:
        raise typer.BadParameter(f"must not all be above --samples {samples}; found {text!r}", param_hint="--k")
    return sorted(set(map(int, parts)))
