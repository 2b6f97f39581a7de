"""Where the time of some steps goes: a trace of torch's profiler for every rank, and its costliest operations."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from mtp_lightning.console.progress import say
from mtp_lightning.errors import refusal_of
from mtp_lightning.files.durable import finished_name, write_whole
from mtp_lightning.training.strategies.base import RunStrategy

FOLDER = "profile"
SHOWN = 10  # operations
STEP = "step: "  # how the parts of a step are called


@final
class StepProfile(Callback):
    """Profile a few steps; every rank writes its own files, and the first shows its costliest operations."""

    def __init__(self, steps: Sequence[int], run_folder: Path) -> None:
        """Take the first and the last step, counted from 1; `run_folder` gets a folder `profile`."""
        self._first, self._last = steps
        self._folder = run_folder / FOLDER
        self._profile: profile | None = None
        self._waited_s, self._ended_at = 0.0, time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say of a run that goes on after the first of these steps that nothing will be profiled."""
        if trainer.global_step >= self._first and cast(RunStrategy, trainer.strategy).ranks.is_first:
            say(f"No profile: the run goes on after step {trainer.global_step}, beyond step {self._first}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin before the first step; the rows are there."""
        if trainer.global_step + 1 == self._first:
            activities = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history()
            self._profile = profile(activities=activities)
            self._profile.start()
        if self._profile is not None:
            self._waited_s += time.monotonic() - self._ended_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End after the last step."""
        if self._profile is not None and trainer.global_step >= self._last:
            self._write(trainer, pl_module.device)
        self._ended_at = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is of a run that was shorter."""
        if self._profile is not None:
            self._write(trainer, pl_module.device)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the profiler."""
        self._stop(pl_module.device)

    def _stop(self, device: torch.device) -> profile | None:
        ended, self._profile = self._profile, None
        if ended is not None:
            ended.stop()
            if device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        return ended

    def _write(self, trainer: Trainer, device: torch.device) -> None:
        ranks = cast(RunStrategy, trainer.strategy).ranks
        with self._told():
            self._folder.mkdir(parents=True, exist_ok=True)
            if device.type == "cuda":
                with finished_name(self._folder / f"rank-{ranks.rank}.memory.pickle") as path:
                    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        ended = self._stop(device)
        assert ended is not None
        text = self._text(ended, trainer.global_step, by="cuda" if device.type == "cuda" else "cpu")
        with self._told():
            with finished_name(self._folder / f"rank-{ranks.rank}.json.gz") as path:
                ended.export_chrome_trace(str(path))
            write_whole(self._folder / f"rank-{ranks.rank}.txt", text.encode("utf-8", "backslashreplace"))
        if ranks.is_first:
            say(f"{text}Traces of all ranks for chrome://tracing or Perfetto: {self._folder}")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say what cannot be written of a profile; the run is worth more."""
        try:
            yield
        except OSError as error:
            say(f"this profile is not whole: {refusal_of(error, self._folder)}; training goes on", stderr=True)

    def _text(self, ended: profile, step: int, *, by: str) -> str:
        """Parts of a step, then the operations."""
        averages = ended.key_averages()
        num_steps = step - self._first + 1
        lines = [
            f"Steps {self._first} to {step}, milliseconds per step:",
            f"  data {1e3 * self._waited_s / num_steps:.1f}",
        ]
        for part in [average for average in averages if average.key.startswith(STEP)]:
            averages.remove(part)
            lines.append(f"  {part.key.removeprefix(STEP)} {part.cpu_time_total / 1e3 / num_steps:.1f}")
        table = averages.table(sort_by=f"self_{by}_time_total", row_limit=SHOWN, max_name_column_width=50)
        return "\n".join([*lines, "", table, ""])
