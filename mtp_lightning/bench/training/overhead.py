"""What watching over a run costs: `mtp bench overhead`.

A real run, in which watchdog, polling for signals and timing of slow ranks are at work in every other round of steps.
Rounds next to each other are compared, so that all see the same weather. A busy machine still blurs a ratio more than
half a percent, so the time inside the callbacks is measured directly, too: it holds whatever else goes on.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.bench.machine import describe_machine
from mtp_lightning.bench.training.speed import spread
from mtp_lightning.console.tables import console, write_json
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.launch.signals import StopRequest
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.fit import build_trainer
from mtp_lightning.training.health.stragglers import Stragglers
from mtp_lightning.training.health.watchdog import Watchdog
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.logging.live import LiveView
from mtp_lightning.training.logging.log_routing import redirect_library_logs
from mtp_lightning.training.logging.summary import Summary
from mtp_lightning.training.saving.interruption import Interruption
from mtp_lightning.training.strategies.device import prepare_device
from mtp_lightning.training.strategies.process_group import process_group

WATCHERS = (Watchdog, Interruption, Stragglers)
WARM_ROUNDS = 2  # one with and one without, in which all that is slow at first happens


@dataclass
class Times:
    """Seconds of every step, and those of them that went into the watchers."""

    round_steps: int
    step_s: list[float] = field(default_factory=list)
    watching_s: list[float] = field(default_factory=list)

    def is_on(self, step: int) -> bool:
        """Tell whether watchers are at work: off, on, on, off, off, on and so on, round by round."""
        return (step // self.round_steps + 1) // 2 % 2 == 1

    def rounds(self, values: Sequence[float]) -> list[float]:
        """Add up whole rounds after the first ones."""
        size = self.round_steps
        sums = [sum(values[first : first + size]) for first in range(0, len(values) - size + 1, size)]
        return sums[WARM_ROUNDS:]


@final
class Clock(Callback):
    """Times steps from the beginning of one to the beginning of the next; must come before all others."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._began_at: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """One step is over, the next begins."""
        now = time.perf_counter()
        if self._began_at is not None:
            self._times.step_s.append(now - self._began_at)
        self._began_at = now
        self._times.watching_s.append(0.0)


@final
class Switched(Callback):
    """A watcher that rests in every other round."""

    def __init__(self, watcher: Callback, times: Times) -> None:
        self._watcher, self._times = watcher, times

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass it on."""
        self._watcher.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Pass it on, unless it rests."""
        if self._times.is_on(batch_idx):
            began_at = time.perf_counter()
            self._watcher.on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self._times.watching_s[-1] += time.perf_counter() - began_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pass it on, unless it rests."""
        if self._times.is_on(batch_idx):
            began_at = time.perf_counter()
            self._watcher.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._times.watching_s[-1] += time.perf_counter() - began_at

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass it on."""
        self._watcher.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Pass it on."""
        self._watcher.on_exception(trainer, pl_module, exception)


@dataclass(frozen=True)
class Overhead:
    """What watching costs, as shares of a step."""

    step_s: float  # without watchers, median over rounds
    inside: float  # time inside the watchers, of the rank that waits least in them
    paired: float  # steps with them against steps without, median over pairs of rounds, less one
    paired_spread: float
    num_pairs: int


def overhead_of(times: Times) -> Overhead:
    """Compare rounds with their neighbours."""
    steps, watching = times.rounds(times.step_s), times.rounds(times.watching_s)
    first = WARM_ROUNDS * times.round_steps
    on = [times.is_on(first + index * times.round_steps) for index in range(len(steps))]
    pairs = [(steps[k], steps[k + 1]) if on[k] else (steps[k + 1], steps[k]) for k in range(0, len(steps) - 1, 2)]
    ratios = [with_them / without for with_them, without in pairs]
    inside = [spent / whole for spent, whole, is_on in zip(watching, steps, on, strict=False) if is_on]
    step_s = median(without for _, without in pairs) / times.round_steps
    return Overhead(step_s, median(inside), median(ratios) - 1, spread(ratios), len(pairs))


def bench_overhead(recipe: Recipe, *, pairs: int, round_steps: int, json_path: Path | None) -> None:
    """Train for `pairs` pairs of rounds in a folder that is thrown away, and print what watching has cost."""
    device = prepare_device(recipe)
    machine = describe_machine(device)
    with process_group(recipe), tempfile.TemporaryDirectory(prefix="mtp-overhead-") as folder:
        short = _short(recipe, (WARM_ROUNDS + 2 * pairs) * round_steps, round_steps)
        overhead = _measured(short, Path(Ranks().broadcast(folder)), round_steps)
        if not Ranks().is_first:
            return
        screen = console()
        screen.print(f"Watchdog, polling for signals and timing of ranks: {recipe.name}", style="bold")
        screen.print(
            f"{Ranks().size} ranks, {overhead.step_s * 1000:.1f} ms per step",
            f"inside the callbacks: {overhead.inside:.3%} of a step",
            f"steps with them against steps without: {overhead.paired:+.3%}, median of {overhead.num_pairs} pairs of "
            f"{round_steps} steps, whose middle half spreads over {overhead.paired_spread:.2%}",
            f"Measured on {machine}.",
            sep="\n",
        )
        figures = {"benchmark": "overhead", "machine": asdict(machine), "round_steps": round_steps}
        write_json(json_path, {**figures, "recipe": recipe.model_dump(mode="json"), **asdict(overhead)})


def _short(recipe: Recipe, steps: int, round_steps: int) -> Recipe:
    """Neither validate nor save between the steps; every round has as many logged steps."""
    run = {
        "steps": steps + 1,  # the last one is followed by a validation
        "validate_every_steps": steps + 1,
        "validation_samples": recipe.strategy.num_shares,
    }
    checkpoint = {"every_steps": None, "every_minutes": None, "keep_every_steps": None}
    logging = {"every_steps": min(recipe.logging.every_steps, round_steps)}
    return recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update=run),
            "checkpoint": recipe.checkpoint.model_copy(update=checkpoint),
            "logging": recipe.logging.model_copy(update=logging),
        }
    )


def _measured(recipe: Recipe, folder: Path, round_steps: int) -> Overhead:
    (folder / "logs").mkdir(exist_ok=True)
    times = Times(round_steps)
    with redirect_library_logs(folder / f"logs/lightning_{Ranks().rank}.log"):
        trainer = build_trainer(recipe, folder, StopRequest())
        kept = [own for own in trainer.callbacks if not isinstance(own, (LiveView, Summary))]  # type: ignore[attr-defined]
        watched = [Switched(own, times) if isinstance(own, WATCHERS) else own for own in kept]
        trainer.callbacks = [Clock(times), *watched]  # type: ignore[attr-defined]
        trainer.fit(MtpLightningModule(recipe), datamodule=MtpDataModule(recipe))
    # Whoever comes first to where ranks agree waits there for the last, instead of a moment later.
    times.watching_s = [min(of_ranks) for of_ranks in zip(*Ranks().gather(times.watching_s), strict=True)]
    return overhead_of(times)
