"""Ways of putting heads on one pretrained model, side by side: `mtp bench adapt`.

Every recipe is laid over the model's own and trained with every seed, each run in a process of its own
(`adapt_training.py`); then its heads, and what its main head says of the same tokens by marginalization, are judged on
the same held-out positions (`adapt_measuring.py`). What is finished is not done again: the same command, given after
an interruption, goes on where it was.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from mtp_lightning.bench.adapt_measuring import Measured, Settings, digest_of_texts, measure_run
from mtp_lightning.bench.adapt_picture import draw_rows
from mtp_lightning.bench.adapt_plan import PlannedRun
from mtp_lightning.bench.adapt_rows import adapt_table, remarks, rows_as_json, rows_of, runs_as_json
from mtp_lightning.bench.adapt_training import check_begun, is_finished, train_run
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.manifest import RECIPE_NAME
from mtp_lightning.console.progress import say
from mtp_lightning.console.tables import console, number, write_json
from mtp_lightning.errors import MtpError, RunFolderError, TrainingError
from mtp_lightning.evaluation.marginal import check_settings
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.launch.run_marker import check_may_be_run

WIDTH = 200
NOTE_NAME = "base.json"


@dataclass(frozen=True)
class Outputs:
    """Files to write beside the table; None for those that nobody asked for."""

    json_path: Path | None = None
    png_path: Path | None = None


def bench_adapt(base: Path, runs: Sequence[PlannedRun], settings: Settings, outputs: Outputs) -> None:
    """Train and measure all runs that need it, print a table, and write figures and picture where paths are given.

    Args:
        base: the model that all start from.
        runs: what `plan_runs` has checked.
        settings: how to measure.
        outputs: files to write.

    Raises:
        CheckpointError: The base cannot be read.
        DataError: The runs cannot be measured on the same texts.
        DecodingError: The settings make no sense.
        RunFolderError: A folder holds a run of another recipe, or runs from another base.
        TrainingError: Some run has failed; the table says which.
    """
    check_settings(settings.num_offsets, settings.last_tokens, settings.top, settings.nucleus, settings.most_paths)
    with redirect_stdout(sys.stderr):  # which is left to the table
        _claim(runs[0].folder.parent, base)
        for run in runs:
            check_begun(run)
        texts_digest = digest_of_texts(runs, settings)
        measured = [_reached(run, settings, texts_digest, f"{k} of {len(runs)}") for k, run in enumerate(runs, start=1)]
    _show(base, measured, settings, outputs)
    if failed := [one for one in measured if one.failure is not None]:
        raise TrainingError(
            "every run of a comparison must end well",
            f"{len(failed)} of {len(runs)} failed: {'; '.join(one.run.title for one in failed)}",
            "Cure the reason and give the same command again: finished runs are not repeated",
        )


def _claim(folder: Path, base: Path) -> None:
    """Note which model the runs of a folder start from, or compare it with the note: it is not in their recipes."""
    model = open_checkpoint(base, verify=False)
    files = {name: record.sha256 for name, record in model.model_files.items() if name != RECIPE_NAME}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    note = folder / NOTE_NAME
    if not note.is_file():
        check_may_be_run(folder, "--out")
        folder.mkdir(parents=True, exist_ok=True)
        replace_durably(note, json.dumps({"base": str(base), "sha256": digest}, indent=2).encode() + b"\n")
    elif (found := json.loads(note.read_text(encoding="utf-8")))["sha256"] != digest:
        raise RunFolderError(
            "all runs of a comparison must start from the same model",
            f"runs from {found['base']} in {folder}"
            + ("" if found["base"] != str(base) else ", which has other weights by now"),
            "Give another --out",
        )


def _reached(run: PlannedRun, settings: Settings, texts_digest: str, place: str) -> Measured:
    """Train a run unless it is finished, and measure it."""
    try:
        if is_finished(run):
            say(f"Run {place}: {run.title}: trained")
        else:
            say(f"Run {place}: {run.title}, in {run.folder}")
            if failure := train_run(run):
                say(f"Run {place}: {run.title} failed: {failure}")
                return Measured(run, failure=failure)
        measured = measure_run(run, settings, texts_digest)
    except MtpError as error:
        say(f"Run {place}: {run.title} failed: {error}")
        return Measured(run, failure=f"{error.expected}; found {error.found}")
    say(f"Run {place}: {run.title}: {_in_words(measured, settings)}")
    return measured


def _in_words(measured: Measured, settings: Settings) -> str:
    assert measured.report is not None
    first, second = measured.report["offsets"][:2]
    of_second = number(second["head_top"], ".3f")
    return f"top-{settings.top} of the next token {first['head_top']:.3f}, of the 2nd {of_second}"


def _show(base: Path, measured: Sequence[Measured], settings: Settings, outputs: Outputs) -> None:
    rows = rows_of(measured)
    screen = console()
    screen.width = max(screen.width, WIDTH)  # a table that is too wide for a terminal is wrapped by it, not cut
    screen.print(f"Adaptations of {base}", style="bold")
    screen.print(adapt_table(rows, settings), "", sep="\n")
    for remark in remarks(rows, measured, settings):
        screen.print(remark, soft_wrap=True)
    if outputs.png_path is not None:
        draw_rows(rows, outputs.png_path, top=settings.top, title=f"Adaptations of {base}")
        screen.print(f"Picture written to {outputs.png_path}", soft_wrap=True)
    write_json(
        outputs.json_path,
        {
            "benchmark": "adapt",
            "base": str(base),
            "settings": asdict(settings),
            "recipes": rows_as_json(rows),
            "runs": runs_as_json(measured),
        },
    )
