import contextlib
import csv
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.errors import RunFolderError
from mtp_lightning.training.logging.columns import metric_columns
from mtp_lightning.training.logging.log_routing import redirect_library_logs
from mtp_lightning.training.logging.loggers import _TensorBoard
from mtp_lightning.training.logging.metrics_files import MetricsTable, read_rows
from tests.support.covering import some_of
from tests.training.callbacks.tiny_run import TinyModule, fit, tiny_recipe

COLUMNS = ["step", "tokens", "train/loss_1", "val/loss_1"]


def test_columns_are_those_promised() -> None:
    assert metric_columns(2) == [
        "step",
        "tokens",
        "lr",
        "train/loss_1",
        "train/loss_2",
        "train/label_accuracy_1",
        "train/label_accuracy_2",
        "train/agreement_2",
        "train/conditional_acceptance_rate_2",
        "train/acceptance_rate_2",
        "train/mean_acceptance_length",
        "train/divergence_2",
        "train/router_loss",
        "grad_norm/trunk",
        "grad_norm/heads",
        "grad_norm/unembedding",
        "grad_norm/lora",
        "grad_norm/layer_mix",
        "grad_norm/all",
        "tokens_per_s",
        "mfu",
        "memory_gib",
        "time/data_s",
        "time/data_min_s",
        "time/data_max_s",
        "time/forward_s",
        "time/forward_min_s",
        "time/forward_max_s",
        "time/backward_s",
        "time/backward_min_s",
        "time/backward_max_s",
        "time/reduce_s",
        "time/reduce_min_s",
        "time/reduce_max_s",
        "time/step_s",
        "time/step_min_s",
        "time/step_max_s",
        "skipped_steps",
        "rollbacks",
        "val/loss_1",
        "val/loss_2",
        "val/label_accuracy_1",
        "val/label_accuracy_2",
        "val/agreement_2",
        "val/conditional_acceptance_rate_2",
        "val/acceptance_rate_2",
        "val/mean_acceptance_length",
        "val/router_loss",
        "val/overlap_2",
        "val/sampled_acceptance_rate_2",
        "val/sampled_acceptance_length",
        "drift/nll_change",
        "drift/nll_change_low",
        "drift/nll_change_high",
        "drift/kl",
        "drift/flips",
    ]


def test_a_row_per_step_with_training_and_validation_side_by_side(tmp_path: Path) -> None:
    _, module = fit(tmp_path, tiny_recipe(steps=7))
    rows = read_rows(tmp_path / "metrics.csv")
    kinds = [(row["step"], row["tokens"], "train/loss_1" in row, "val/loss_1" in row) for row in rows]
    assert kinds == [
        (2, 128, True, False),
        (3, 192, False, True),
        (4, 256, True, False),
        (6, 384, True, True),
        (7, 448, True, False),
    ]
    sums = [sum(row[f"train/loss_{k}"] for k in (1, 2, 3)) for row in rows if "train/loss_1" in row]
    assert sums == pytest.approx([module.seen[step - 1][2] for step in (2, 4, 6, 7)], rel=1e-6)


def read_cells(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_every_row_has_every_cell(tmp_path: Path) -> None:
    fit(tmp_path, tiny_recipe())
    header, *rows = read_cells(tmp_path / "metrics.csv")
    assert header == metric_columns(3)
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.parametrize("stop", some_of(range(1, 6), one_in=2))
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    fit(tmp_path / "whole", tiny_recipe())
    fit(tmp_path / "cut", tiny_recipe(), until=stop)
    with (tmp_path / "cut" / "metrics.csv").open("a") as file:  # written, but lost to a kill before a checkpoint
        file.write(",".join([str(stop + 1)] + ["1.0"] * (len(metric_columns(3)) - 1)) + "\n1")
    fit(tmp_path / "cut", tiny_recipe())
    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_rows_are_on_disk_as_soon_as_the_next_step_begins(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    module = TinyModule(recipe)
    found: list[list[int | float]] = []
    module.on_step = lambda step: found.append([row["step"] for row in read_rows(tmp_path / "metrics.csv")])
    fit(tmp_path, recipe, module=module)
    assert found == [[], [], [2], [2, 3], [2, 3, 4], [2, 3, 4]]


@pytest.mark.parametrize(
    "torn", ["1", "12", "12,", "12,34,0.5", "12,34,0.5,0.25", "12,34\n", "\0\0\0\n", '1"2,3,4,5\n', "x,1,2,3\n"]
)
def test_a_row_cut_short_by_a_kill_is_left_out(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(",".join(COLUMNS) + "\n10,100,0.5,\n" + torn)
    assert read_rows(path) == [{"step": 10, "tokens": 100, "train/loss_1": 0.5}]
    table = MetricsTable(path, COLUMNS)
    table.begin(20)
    table.append({"step": 21})
    table.close()
    assert read_cells(path)[1:] == [["10", "100", "0.5", ""], ["21", "", "", ""]]


def test_an_empty_or_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.csv") == []
    (tmp_path / "empty.csv").touch()
    assert read_rows(tmp_path / "empty.csv") == []


def test_rows_move_to_new_columns_by_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/loss_1,gone\n1,0.5,7\n")
    table = MetricsTable(path, COLUMNS)
    table.begin(1)
    table.close()
    assert read_cells(path) == [COLUMNS, ["1", "", "", "0.5"]]


def test_what_is_no_number_leaves_its_cell_empty(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv", COLUMNS)
    table.begin(0)
    values: list[Any] = [None, "text", torch.ones(2), [1.0], torch.tensor(0.5), math.nan, math.inf, 3]
    for step, value in enumerate(values, 1):
        table.append({"step": step, "train/loss_1": value, "unknown": 1})
    table.close()
    cells = [row[2] for row in read_cells(tmp_path / "metrics.csv")[1:]]
    assert cells == ["", "", "", "", "0.5", "nan", "inf", "3"]


def test_single_precision_survives_the_file(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv", COLUMNS)
    table.begin(0)
    value = torch.rand((), generator=torch.Generator().manual_seed(3))
    table.append({"step": 1, "train/loss_1": value.item()})
    table.close()
    assert torch.tensor(read_rows(tmp_path / "metrics.csv")[0]["train/loss_1"]) == value


def test_a_file_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(RunFolderError, match=r"metrics must be written to .*metrics\.csv"):
        MetricsTable(tmp_path / "metrics.csv", COLUMNS).begin(0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv", COLUMNS)
    table.begin(0)
    table._file.close()  # type: ignore[union-attr]
    table._file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(RunFolderError, match="No space left on device"):
        table.append({"step": 1})
    table.close()


def test_remarks_of_libraries_on_a_full_disk_are_given_up_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lightning.log").symlink_to("/dev/full")
    other = logging.FileHandler("/dev/full")
    with redirect_library_logs(tmp_path / "lightning.log"):
        for remark in ("one", "two"):
            logging.getLogger("lightning.pytorch").critical(remark)
            other.handle(logging.makeLogRecord({"msg": "of W&B, say"}))
    with contextlib.suppress(OSError):
        other.close()
    said = capsys.readouterr().err
    assert said.startswith("remarks of libraries are not kept: ")
    assert said.count("\n") == said.count("No space left on device") == 1


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint_every_steps=100)
    fit(tmp_path / "whole", recipe)
    fit(tmp_path / "cut", recipe, until=3)
    shutil.copytree(tmp_path / "cut" / "checkpoints", tmp_path / "kept")
    fit(tmp_path / "cut", recipe)
    shutil.rmtree(tmp_path / "cut" / "checkpoints")  # as if the last attempt had been killed before it saved
    shutil.copytree(tmp_path / "kept", tmp_path / "cut" / "checkpoints")
    fit(tmp_path / "cut", recipe)
    events = events_of(tmp_path / "cut" / "tensorboard")
    assert [step for step, _ in events["train/loss_1"]] == [2, 4, 6]
    assert events == events_of(tmp_path / "whole" / "tensorboard")
    assert len(list((tmp_path / "cut" / "tensorboard").iterdir())) == 3


def test_tensorboard_reads_attempts_in_their_order_whatever_the_clocks_of_their_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((2_000_000_000.5, 2_000_000_000.9, 1_999_999_000.0, 1_999_999_000.0))
    for step in (2, 4, 6, 8):
        now = next(clock)
        monkeypatch.setattr(time, "time", lambda now=now: now)
        logger = _TensorBoard(tmp_path, after_step=step - 2)
        logger.log_metrics({"loss": float(step)}, step)
        logger.finalize("success")
    monkeypatch.undo()
    names = sorted(path.name.split(".")[3] for path in (tmp_path / "tensorboard").iterdir())
    assert len(set(names)) == 4
    assert max(names) == "1999999000"
    assert events_of(tmp_path / "tensorboard")["loss"] == [(step, float(step)) for step in (2, 4, 6, 8)]
