"""The guard of the main head: warns, and stops a run whose other heads do it harm."""

from collections.abc import Iterator
from typing import Any, cast, final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.loading.dataset import ValidationBatches
from mtp_lightning.errors import TrainingError
from mtp_lightning.recipe.schema.root import DriftSection, Recipe
from mtp_lightning.training.health.drift_measure import Drift, Record, Rows, drift_of, drift_sums, evaluating, record
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.strategies.base import RunStrategy

HINT = (
    "Lower objective.distill.beta or the weights of the extra offsets (objective.weights), keep them out of the trunk "
    "with heads.detach_trunk=true, or lower optimizer.lr. Checkpoints of before are in the run folder."
)


WRECK_NATS = 0.5


def guard_of(recipe: Recipe) -> DriftSection | None:
    """Return the guard of a run: its own, or by default one where a model that was there before is trained on.

    A run that keeps the optimizer goes on with the training of before. Where nothing is trained that the main head
    reads, as when Medusa's heads are put on a frozen trunk, it stays what it was.

    >>> guard_of(Recipe()), guard_of(Recipe.model_validate({"init": {"path": "runs/a"}})).stop_loss
    (None, 0.5)
    """
    drift, init = recipe.health.drift, recipe.init
    if drift != "auto":
        return drift
    is_adapted = init.path is not None and not init.optimizer
    path = {"trunk", "unembedding"} | ({"heads"} if recipe.heads.kind in ("parallel", "chained") else set())
    trains_main = recipe.first_trained_offset is None and not path <= {*recipe.frozen_parts}
    return DriftSection(stop_loss=WRECK_NATS) if is_adapted and trains_main else None


@final
class MainHeadGuard(Callback):
    """Look at the main head every so many steps, on logged ones, and compare it with the model of the start.

    What that said about the rows is kept in every checkpoint, so that a resumed run is compared with the same. The
    stop comes before the next step, so that the figures are in metrics.csv, and before the step is saved.
    """

    def __init__(self, recipe: Recipe, section: DriftSection) -> None:
        self._recipe, self._section = recipe, section
        self._reference: Record | None = None  # of all ranks' rows
        self._looked_step = 0
        self._stop: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the model of the start says, unless a checkpoint has brought it."""
        self._looked_step = trainer.global_step
        if self._reference is None:
            module, ranks = cast(MtpLightningModule, pl_module), cast(RunStrategy, trainer.strategy).ranks
            with module.autocast(), evaluating(module.model):
                own = [record(module.model, rows) for rows in self._rows(trainer)]
            parts = [part for of_rank in ranks.gather(own) for part in of_rank]
            self._reference = Record(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time."""
        module, step = cast(MtpLightningModule, pl_module), trainer.global_step
        is_due = step - self._looked_step >= self._section.every_steps or step == self._recipe.run.steps
        if is_due and module.metrics:
            self._looked_step = step
            drift = self._look(trainer, module)
            module.metrics |= drift.figures
            self._judge(drift, step, is_first=trainer.is_global_zero)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here if the last look said so."""
        self._stop_if_asked()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here if the last look said so."""
        self._stop_if_asked()

    def state_dict(self) -> dict[str, Any]:
        """What the model of the start said."""
        return {"reference": None if self._reference is None else tuple(self._reference)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the same model."""
        reference = state_dict["reference"]
        self._reference = None if reference is None else Record(*reference)

    def _look(self, trainer: Trainer, module: MtpLightningModule) -> Drift:
        assert self._reference is not None
        ranks = cast(RunStrategy, trainer.strategy).ranks
        first = ranks.rank * (len(self._reference.losses) // ranks.size)
        sums = torch.zeros(6, dtype=torch.float64, device=module.device)
        with module.autocast(), evaluating(module.model):
            for rows in self._rows(trainer):
                there = slice(first, first + len(rows.tokens))
                sums += drift_sums(module.model, rows, Record(*(tensor[there] for tensor in self._reference)))
                first = there.stop
        return drift_of(sums, ranks)

    def _rows(self, trainer: Trainer) -> Iterator[Rows]:
        """Yield this rank's held-out rows; the same number on every rank."""
        held_out = cast(MtpDataModule, trainer.datamodule).validation_samples  # type: ignore[attr-defined]
        share = min(self._section.samples, len(held_out)) // trainer.world_size
        num_rows = share * trainer.world_size if self._reference is None else len(self._reference.losses)
        share = num_rows // trainer.world_size
        batches = ValidationBatches(
            rows=held_out,
            numbers=held_out.spread(num_rows)[trainer.global_rank * share : (trainer.global_rank + 1) * share],
            batch_rows=self._recipe.batch.micro_batch_size,
            vocab_size=self._recipe.model.vocab_size,
        )
        for batch in batches:
            there = {name: tensor.to(trainer.strategy.root_device) for name, tensor in batch.items()}
            yield Rows(there["tokens"], there["documents"], there.get("loss_mask"))

    def _judge(self, drift: Drift, step: int, *, is_first: bool) -> None:
        section = self._section
        found = {"loss": drift.low, "kl": drift.kl, "flips": drift.flips}
        crossed = {
            level: [
                name for name, value in found.items() if value > (getattr(section, f"{level}_{name}") or float("inf"))
            ]
            for level in ("warn", "stop")
        }
        if crossed["stop"]:
            limits = ", ".join(f"health.drift.stop_{name}" for name in crossed["stop"])
            self._stop = f"{limits} crossed at step {step}: {drift}"
        elif crossed["warn"] and is_first:
            say(f"Guard at step {step}: {drift}. {HINT}")

    def _stop_if_asked(self) -> None:
        if self._stop is not None:
            raise TrainingError(
                "the main head must stay as good as the model that the run started from", self._stop, HINT
            )
