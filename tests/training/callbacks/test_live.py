import io
import math
import os
import pty
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from mtp_lightning.training.logging.columns import metric_columns
from mtp_lightning.training.logging.live import (
    SHORTEST_PAUSE_S,
    LiveView,
    count,
    duration,
    live_view,
    plain_line,
    plain_validation,
)
from mtp_lightning.training.logging.progress import Progress
from mtp_lightning.training.saving.save_checkpoints import Checkpoints
from tests.training.callbacks.tiny_run import LAYERS, fit, tiny_recipe


def full_progress(num_offsets: int, *, steps: int = 300) -> Progress:
    """Progress with a figure in every column, each within a plausible range but long when written out."""
    figures = dict.fromkeys(metric_columns(num_offsets), 0.123456)
    for k in range(1, num_offsets + 1):
        figures |= {f"train/loss_{k}": 10 + k / 8, f"val/loss_{k}": 11 + k / 8}
        figures |= {f"train/acceptance_rate_{k}": 1 / k, f"val/acceptance_rate_{k}": 1.0}
    figures |= {"train/mean_acceptance_length": 1.234, "val/mean_acceptance_length": 2.345, "lr": 9.8e-4}
    figures |= {"tokens_per_s": 1_234_567.8, "memory_gib": 123.456}
    figures |= {f"grad_norm/{role}": 0.123 for role in ("trunk", "heads", "unembedding", "all")}
    progress = Progress(tiny_recipe(num_offsets, steps=steps))
    progress.advance(steps - 2)
    progress.take(figures, steps - 1)
    progress.advance(steps - 1)
    progress.saved_step = steps - 1
    return progress


def rendered(view: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("num_offsets", [1, 4, 8])
@pytest.mark.parametrize("steps", [300, 1_000_000])
def test_the_view_fits_its_width_without_cuts(width: int, num_offsets: int, steps: int) -> None:
    lines = rendered(live_view(full_progress(num_offsets, steps=steps)), width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert len(lines) == 3 + num_offsets + (5 if num_offsets > 1 else 4)  # with the roles that adaptation adds


def test_every_figure_of_an_offset_is_in_its_row() -> None:
    lines = rendered(live_view(full_progress(3)), 80).splitlines()
    bits = (10 + 3 / 8) / math.log(2)
    assert lines[5].split() == ["3", "10.375", f"{bits:.3f}", "12.3%", "12.3%", "12.3%", "33.3%", "11.375", "100.0%"]
    assert "grad norm  trunk 0.12  heads 0.12  unembedding 0.12  all 0.12   lr 9.80e-04" in lines
    assert "           lora 0.12  layer_mix 0.12" in lines
    assert "acceptance length  train 1.23  val 2.35 at step 299 (the best so far)" in [line.strip() for line in lines]
    assert any("1.23M tokens/s  12% MFU  123.46 GiB  last checkpoint step 299" in line for line in lines)
    assert lines[6].startswith("step 299/300")
    assert len(lines[-1]) < 77, "room for an echoed ^C behind the cursor"


def test_a_run_that_adds_nothing_shows_nothing_of_it() -> None:
    progress = full_progress(3)
    for role in ("lora", "layer_mix"):
        del progress.train[f"grad_norm/{role}"]
    assert "lora" not in rendered(live_view(progress), 80)


def test_losses_of_other_tokenizers_are_bits_per_token() -> None:
    progress = full_progress(2)
    data = progress.recipe.data.model_copy(update={"tokenizer": "bpe.json"})
    progress.recipe = progress.recipe.model_copy(update={"data": data})
    assert "/token" in rendered(live_view(progress), 80)
    assert "/byte" not in rendered(live_view(progress), 80)


def test_an_empty_view_keeps_the_columns_where_they_will_be() -> None:
    empty, full = (rendered(live_view(p), 80).splitlines() for p in (Progress(tiny_recipe(4)), full_progress(4)))
    assert empty[:3] == full[:3]


def test_the_best_of_earlier_validations_is_shown() -> None:
    progress = Progress(tiny_recipe())
    for step, length in ((10, 1.5), (20, 1.9), (30, 1.7), (40, math.nan)):
        progress.take({"val/mean_acceptance_length": length, "val/loss_1": 1.0}, step)
    assert "val - at step 40 (best 1.90 at step 20)" in rendered(live_view(progress), 80)


def test_figures_that_are_no_numbers_do_not_break_the_view() -> None:
    progress = Progress(tiny_recipe())
    progress.take({"train/loss_1": None, "lr": "high", "val/loss_1": math.nan, "grad_norm/all": math.inf}, 1)
    assert rendered(live_view(progress), 80)
    assert plain_line(progress)
    assert plain_validation(progress)


def test_the_remaining_time_follows_the_rate_of_this_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(tiny_recipe(steps=100))
    assert math.isnan(progress.eta_s)
    for now, step in ((1000.0, 51), (1020.0, 61)):  # the first step after a resume takes as long as it likes
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        progress.advance(step)
    assert progress.eta_s == pytest.approx(39 * 2.0)


def test_without_a_terminal_each_logged_step_and_validation_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, tiny_recipe())
    lines = capsys.readouterr().out.splitlines()
    starts = ["step 2/6", "validation at step 3", "step 4/6", "step 6/6", "validation at step 6"]
    assert [line.split("  ")[0] for line in lines] == starts
    assert "128 tokens" in lines[0]
    assert "640 tokens/s  ETA 0:0" in lines[0]
    assert lines[0].count("%") == 2
    assert not any("\x1b" in line for line in lines)


def test_figures_of_before_are_shown_after_a_resume(tmp_path: Path) -> None:
    fit(tmp_path, tiny_recipe(), until=4)
    recipe = tiny_recipe()
    checkpoints = Checkpoints(recipe, tmp_path / "checkpoints", layers=LAYERS)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    view = LiveView(recipe, tmp_path, checkpoints, console)
    fit(tmp_path, recipe, extra=[view], until=5)
    first_frame = console.file.getvalue().split("GiB")[0]  # type: ignore[attr-defined]
    assert "at step 3 (the best so far)" in first_frame


def test_a_terminal_gets_a_table_in_place_at_a_bounded_rate(tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=40, log_every_steps=1, checkpoint_every_steps=100, validate_every_steps=100)
    checkpoints = Checkpoints(recipe, tmp_path / "unused", layers=LAYERS)
    leader, follower = pty.openpty()
    chunks: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                chunks.append(os.read(leader, 65536))
            except OSError:
                return

    thread = threading.Thread(target=drain)
    thread.start()
    with os.fdopen(follower, "w") as terminal:
        view = LiveView(recipe, tmp_path, checkpoints, Console(file=terminal, width=80))
        began_at = time.monotonic()
        fit(tmp_path, recipe, extra=[view])
        elapsed_s = time.monotonic() - began_at
    thread.join()
    os.close(leader)
    text = b"".join(chunks).decode()
    frames = text.split("/byte")
    assert "\x1b[1A" in text, "it moves up to draw over itself"
    most = 4 + elapsed_s / SHORTEST_PAUSE_S  # at start, first step, end (twice)
    assert 2 <= len(frames) - 1 <= most, f"{len(frames)} frames in {elapsed_s:.2f} s with 40 logged steps"
    assert "step 40/40" in frames[-1], "the last state stays"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.34, "12.3"), (999.6, "1e+03"), (1000, "1k"), (999_900, "1000k"), (1.5e9, "1.5G"), (None, "-")],
)
def test_counts_have_three_digits(value: float | None, text: str) -> None:
    assert count(value) == text


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3600, 360_000, math.nan)] == ["0:00", "1:00", "1:00:00", "100:00:00", "-"]
