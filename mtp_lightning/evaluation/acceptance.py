"""How often a trained model's drafts are accepted on held-out rows, measured as every validation of a run does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.console.progress import counted
from mtp_lightning.data.loading.dataset import ValidationBatches
from mtp_lightning.data.loading.factory import open_rows, prepare_data
from mtp_lightning.errors import DataError
from mtp_lightning.losses.targets import count_targets, shifted_targets
from mtp_lightning.recipe import Recipe
from mtp_lightning.training.step.backward_order import evaluate
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.metrics import OffsetMetrics
from mtp_lightning.training.step.objective import Objective


@dataclass(frozen=True)
class Acceptance:
    """Figures of a model on held-out rows, by the names of metrics.csv without `val/`."""

    recipe: str
    num_offsets: int
    num_rows: int
    figures: dict[str, float]
    by_source: dict[str, dict[str, float]]  # of a mixture; losses are not known apart

    def as_json(self) -> dict[str, Any]:
        """Return plain values to be written to a file."""
        return {**self.__dict__}


@torch.no_grad()
def measure_acceptance(
    path: Path, *, num_rows: int, shards: str | None = None, device: str = "cpu", dtype: torch.dtype | None = None
) -> Acceptance:
    """Measure a run, checkpoint or exported folder on rows spread evenly over the held-out split.

    Args:
        path: what to load.
        num_rows: how many rows; fewer where there are fewer.
        shards: a folder of shards to read instead of the recipe's data.
        device: where to compute.
        dtype: type of the weights; None takes the stored one.

    Raises:
        CheckpointError: There is nothing to load, or it is damaged.
        DataError: Shards are missing, do not fit the model, or hold nothing out.
    """
    recipe, model = load_model(path, device=device, dtype=dtype)
    if shards is not None:
        data = recipe.data.model_copy(update={"shards": shards, "mixture": {}, "max_epochs": {}})
        recipe = recipe.model_copy(update={"data": data})
    batches = _held_out(recipe, num_rows)
    names = batches.rows.source_names
    whole, own = OffsetMetrics(model.num_offsets).to(device), [OffsetMetrics(model.num_offsets) for _ in names]
    with counted("Measuring", total=int(batches.numbers.size), unit="rows") as advance:
        for batch in batches:
            there = {name: tensor.to(device) for name, tensor in batch.items()}
            tokens, documents = there["tokens"], there["documents"]
            targets = shifted_targets(tokens, documents, model.num_offsets, there.get("loss_mask"))
            objective = Objective(recipe.objective, [1.0] * len(targets), count_targets(targets), predicts=True)
            losses = evaluate(model, MicroBatch(tokens, documents, targets), objective)
            whole.update(targets, losses)
            for source, metrics in enumerate(own):
                if (chosen := batch["sources"] == source).any():
                    metrics.to(device).update(targets[:, chosen], losses.of_rows(chosen))
            advance(len(tokens))
    by_source = {name: _without_losses(metrics) for name, metrics in zip(names, own, strict=True)}
    return Acceptance(recipe.name, model.num_offsets, int(batches.numbers.size), whole.compute(), by_source)


def _held_out(recipe: Recipe, num_rows: int) -> ValidationBatches:
    prepare_data(recipe)
    rows = open_rows(recipe, "validation")
    if len(rows) == 0:
        raise DataError(
            "shards to measure on must hold rows out", "none", "Build them with a larger data.validation_fraction"
        )
    return ValidationBatches(
        rows=rows,
        numbers=rows.spread(min(num_rows, len(rows))),
        batch_rows=recipe.batch.micro_batch_size,
        vocab_size=recipe.model.vocab_size,
    )


def _without_losses(metrics: OffsetMetrics) -> dict[str, float]:
    return {name: figure for name, figure in metrics.compute().items() if not name.startswith("loss_")}
