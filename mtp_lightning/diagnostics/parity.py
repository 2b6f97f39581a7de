"""Compare the gradients that every ZeRO stage and backward order hands to the optimizer with those of plain torch.

A cell is a combination of stage, ranks, backward order, micro-batches, unembedding, heads, clipping. Each trains for
a few steps by the Lightning module, strategy and trainer of every run, and compared with `reference_loop`: gradients
before each step and weights after it, parameter by parameter, under SGD with momentum. AdamW would turn the rounding of
near-zero gradients into visible steps, so under AdamW the losses of 20 steps are compared instead. Muon, with AdamW for
what is no matrix, is compared as SGD is, over three steps.
"""

import gc
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import _muon as torch_muon
from torch.utils.data import DataLoader

from mtp_lightning.diagnostics.parity_matrix import RANKS, Cell
from mtp_lightning.diagnostics.plain_loop import PlainStep, build_named_optimizer, random_batch, reference_loop
from mtp_lightning.errors import TrainingError
from mtp_lightning.launch.ending import end_with
from mtp_lightning.launch.local import run_ranks
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.step import muon
from mtp_lightning.training.strategies.base import RunStrategy
from mtp_lightning.training.strategies.device import prepare_device
from mtp_lightning.training.strategies.process_group import process_group
from mtp_lightning.training.strategies.zero import build_strategy

TOLERANCE = 1e-5  # relative: of a parameter's gradient, and of its value
LOSS_TOLERANCE = 1e-4  # relative: of an offset's loss
CELLS_BETWEEN_COLLECTIONS = 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How far a cell is from plain torch: worst relative errors over parameters (or offsets) and steps."""

    cell: Cell
    gradients: float = 0.0
    weights: float = 0.0
    losses: float = 0.0
    worst: str = ""  # parameter and step of the worst gradient
    failure: str = ""  # what stopped it

    @property
    def error(self) -> float:
        """The larger of the gradients' and the weights' error; infinite where the cell did not run through."""
        return math.inf if self.failure else max(self.gradients, self.weights)

    @property
    def is_good(self) -> bool:
        """Tell whether every error is within its tolerance; NaN is not."""
        return self.error <= TOLERANCE and self.losses <= LOSS_TOLERANCE


def compare_strategies(cells: Sequence[Cell]) -> list[Outcome]:
    """Run cells in processes of their own, those of one rank first, then those of two; return their outcomes.

    Raises:
        TrainingError: The ranks ended before the last cell.
    """
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks in RANKS:
            own, results = Path(folder) / f"{num_ranks}.cells.jsonl", Path(folder) / f"{num_ranks}.jsonl"
            expected = [cell for cell in cells if cell.ranks == num_ranks]
            if not expected:
                continue
            own.write_text("".join(json.dumps(asdict(cell)) + "\n" for cell in expected))
            recipe = Recipe.model_validate({"strategy": {"kind": "zero1", "ranks_per_node": num_ranks}})
            code = run_ranks(recipe, ["doctor", "--strategies", "--cells", str(own), "--results", str(results)])
            end_with(code)
            found = read_outcomes(results)
            if code or len(found) != len(expected):
                raise TrainingError(
                    f"{num_ranks} ranks must be able to run all {len(expected)} cells of the comparison",
                    f"exit code {code} after {len(found)}",
                    "See what the ranks have said above",
                )
            outcomes += found
    return outcomes


def read_cells(path: Path) -> list[Cell]:
    """Read the cells that `compare_strategies` asks its ranks for."""
    return [Cell(**json.loads(line)) for line in path.read_text().splitlines()]


def read_outcomes(path: Path) -> list[Outcome]:
    """Read the outcomes that `compare_all` has written."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return [Outcome(**{**record, "cell": Cell(**record["cell"])}) for record in records]


def compare_all(cells: list[Cell], results: Path, on_result: Callable[[int, Outcome], None]) -> None:
    """Run cells one after the other on the ranks that this process is one of; the first rank writes and reports.

    Args:
        cells: all of this number of ranks.
        results: file to append one line of JSON per cell to.
        on_result: called on the first rank with the number of cells done and the last one's outcome.
    """
    with process_group(cells[0].recipe), _silence_libraries(), results.open("a") as file:
        gc.freeze()  # of no use to look through torch after every cell
        for number, cell in enumerate(cells, start=1):
            outcome = run_cell(cell)
            if number % CELLS_BETWEEN_COLLECTIONS == 0:
                gc.collect()  # engines are cycles; looking for them takes a fifth of a cell's time
            if Ranks().is_first:
                file.write(json.dumps(asdict(outcome)) + "\n")
                file.flush()
                on_result(number, outcome)


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Suppress log lines and warnings that Lightning and DeepSpeed give at every start."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def run_cell(cell: Cell) -> Outcome:
    """Train a cell with Lightning and compare it on the way; all its ranks call this."""
    with _exact_muon():
        return _run_cell(cell)


def _run_cell(cell: Cell) -> Outcome:
    recipe = cell.recipe
    plain = replace(cell, stage="single", ranks=1, backward_order="joint", accumulation=1, sequence_parallel=1)
    comparison = _Comparison(_expected(plain), cell)
    module, device = _Module(recipe, cell.optimizer), prepare_device(recipe)
    trainer = L.Trainer(
        accelerator=device.type,
        devices=1,
        strategy=build_strategy(recipe, device),
        precision="32-true",
        max_steps=recipe.run.steps,
        max_epochs=-1,
        callbacks=[comparison],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        with Ranks().raise_on_all_ranks():
            trainer.fit(module, datamodule=RandomData(recipe, Ranks()))
    except Exception as error:
        return Outcome(cell=cell, failure=f"{type(error).__name__}: {error}")
    return comparison.outcome()


class _Kept(Tensor):
    """A tensor that stays in its type."""

    def bfloat16(self, *_: Any) -> Tensor:
        """Return a copy."""
        return self.clone().as_subclass(Tensor)


@contextmanager
def _exact_muon() -> Iterator[None]:
    """Let Muon iterate in fp32: in torch's bf16, rounding errors of a gradient grow to a part in 250 of the step."""

    def exact(gradient: Tensor, *args: Any) -> Tensor:
        return in_bf16(gradient.as_subclass(_Kept), *args)

    in_bf16 = torch_muon._zeropower_via_newtonschulz
    with (
        patch.object(torch_muon, "_zeropower_via_newtonschulz", exact),
        patch.object(muon, "_zeropower_via_newtonschulz", exact),
        patch.object(muon, "ORTHOGONAL_TYPE", torch.float32),
    ):
        yield


@cache
def _expected(cell: Cell) -> list[PlainStep]:
    return reference_loop(cell.recipe, cell.optimizer)


@final
class _Module(MtpLightningModule):
    """The module of every run, under the optimizer of a cell."""

    def __init__(self, recipe: Recipe, optimizer_name: str) -> None:
        super().__init__(recipe)
        self.optimizer_name = optimizer_name

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, AdamW or Muon."""
        return build_named_optimizer(self.model, self.recipe.optimizer, self.optimizer_name, self.strategy.runs_of)


@final
class RandomData(L.LightningDataModule):
    """This rank's rows of the batches that `reference_loop` sees."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        super().__init__()
        self.recipe, self.ranks = recipe, ranks

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """One batch per step."""
        strategy = self.recipe.strategy
        share, place = self.recipe.batch.global_batch_size // strategy.num_shares, self.ranks.rank
        first = place // strategy.sequence_parallel * share
        own = slice(first, first + share)
        batches = [random_batch(self.recipe, step) for step in range(self.recipe.run.steps)]
        own_batches = [{name: rows[own] for name, rows in batch.items()} for batch in batches]
        return DataLoader(own_batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set

    def advance(self, rows: int) -> None:
        """Do nothing: nobody resumes."""


@final
class _Comparison(Callback):
    """Compares every rank's shards with the reference loop; the ranks' sums make the errors."""

    def __init__(self, expected: list[PlainStep], cell: Cell) -> None:
        self.expected, self.cell = expected, cell
        self.sums: dict[str, Tensor] = {}  # kind, step, parameter -> squares of difference and of expected, entries
        self.losses = 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Compare gradients: the very last moment before the optimizer clips and uses them."""
        if self.cell.optimizer != "adamw":
            self._compare(trainer, "gradient", self.expected[trainer.global_step].gradients)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Compare weights under SGD, losses under AdamW."""
        expected = self.expected[trainer.global_step - 1]
        if self.cell.optimizer != "adamw":
            self._compare(trainer, "weight", expected.weights)
        for offset, loss in enumerate(expected.losses, start=1):
            error = abs(pl_module.metrics[f"train/loss_{offset}"] - loss) / loss
            self.losses = math.nan if math.isnan(error) else max(self.losses, error)

    def _compare(self, trainer: L.Trainer, kind: str, expected: dict[str, Tensor]) -> None:
        strategy, step = trainer.strategy, trainer.global_step
        assert isinstance(strategy, RunStrategy)
        for name in expected:
            self.sums[f"{kind} {step} {name}"] = torch.zeros(3, dtype=torch.float64)
        for shard in strategy.param_shards():
            values = getattr(shard, kind)
            if values is not None:
                run = slice(shard.start, shard.start + values.numel())
                wanted = expected[shard.name].view(-1)[run].to(values.device, torch.float64)
                squares = [float((values.double() - wanted).square().sum()), float(wanted.square().sum())]
                sums = torch.tensor([*squares, values.numel()], dtype=torch.float64)
                self.sums[f"{kind} {step} {shard.name}"] += sums

    def outcome(self) -> Outcome:
        """Put the ranks' sums together; all ranks call this."""
        keys = list(self.sums)
        sums = Ranks().sum(torch.stack(list(self.sums.values()))) if keys else torch.zeros(0, 3)
        errors = {key: self._error(key, row) for key, row in zip(keys, sums.tolist(), strict=True)}
        gradients = {key: error for key, error in errors.items() if key.startswith("gradient")}
        worst = max(gradients, key=lambda key: gradients[key], default="")
        return Outcome(
            cell=self.cell,
            gradients=gradients.get(worst, 0.0),
            weights=max((error for key, error in errors.items() if key.startswith("weight")), default=0.0),
            losses=max(Ranks().gather(self.losses)),
            worst=worst,
        )

    def _error(self, key: str, sums: list[float]) -> float:
        """Relative error of a parameter; infinite where shards do not cover it, or are not finite."""
        _, _, name = key.split(" ", 2)
        differing, expected, entries = sums
        is_whole = entries == self.expected[0].weights[name].numel() and math.isfinite(differing)
        if not expected:  # the half of a low-rank update whose other half is zero yet
            return 0.0 if is_whole and not differing else math.inf
        return math.sqrt(differing / expected) if is_whole else math.inf
