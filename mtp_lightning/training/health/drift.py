"""Watch how far training drifts the main head from the model it started as, on the same held-out rows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.loading.dataset import ValidationBatches
from mtp_lightning.errors import TrainingError
from mtp_lightning.losses.chunked import chunk_rows
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.head_kinds import registered
from mtp_lightning.recipe.schema.root import DriftSection, Recipe
from mtp_lightning.training.lightning_module import MtpLightningModule

KEPT_ENTRIES = 64  # likeliest tokens of the reference that are kept at each position; the rest are counted together
Z_95 = 1.96
HINT = (
    "Lower objective.distill.beta or the weights of the extra offsets (objective.weights), keep them out of the trunk "
    "with heads.detach_trunk=true, or lower optimizer.lr. Checkpoints of before are in the run folder."
)
DEFAULT_STOP_NATS = 0.5  # rise of the main head's loss


class HeldOut(NamedTuple):
    """Held-out sequences."""

    tokens: Tensor  # (R, T+n)
    documents: Tensor  # (R, T+n)
    loss_mask: Tensor | None  # (R, T+n)


class Record(NamedTuple):
    """Predictions of the reference, the model at the start, for some sequences; the likeliest token comes first."""

    losses: Tensor  # (R, T) of the main head; 0 where there is no target
    entries: Tensor  # (R, T, K) int32 tokens
    log_probabilities: Tensor  # (R, T, K) float32


@dataclass(frozen=True)
class Drift:
    """Differences between a model's main head and the reference's."""

    loss_change: float  # mean over rows of the difference of their mean losses, in nats
    low: float  # of its 95 % interval, rows taken as pairs
    high: float
    kl: float  # of the reference from the model, in nats, all but the kept tokens taken as one: a lower bound
    flips: float  # share of positions whose likeliest token is another

    @property
    def figures(self) -> dict[str, float]:
        """Columns of metrics.csv."""
        return {
            "drift/nll_change": self.loss_change,
            "drift/nll_change_low": self.low,
            "drift/nll_change_high": self.high,
            "drift/kl": self.kl,
            "drift/flips": self.flips,
        }

    def __str__(self) -> str:
        return (
            f"the main head's loss has changed by {self.loss_change:+.4f} nats (95 % interval {self.low:+.4f} to "
            f"{self.high:+.4f}), KL {self.kl:.4f}, {self.flips:.1%} of its likeliest tokens are others"
        )


@contextmanager
def evaluating(model: MtpModel) -> Iterator[None]:
    """Switch the model to evaluation mode (no dropout) inside the body."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def record(model: MtpModel, rows: HeldOut) -> Record:
    """Return the main head's losses and likeliest tokens for held-out sequences, on the CPU."""
    losses, entries, kept = [], [], []
    targets = _targets(model, rows)
    for part, log_probabilities in _main_log_probabilities(model, rows):
        top = log_probabilities.topk(min(KEPT_ENTRIES, log_probabilities.shape[-1]))
        losses.append(_losses(log_probabilities, targets[:, part]).cpu())
        entries.append(top.indices.to(torch.int32).cpu())
        kept.append(top.values.float().cpu())
    return Record(torch.cat(losses, 1), torch.cat(entries, 1), torch.cat(kept, 1))


@torch.no_grad()
def drift_sums(model: MtpModel, rows: HeldOut, reference: Record) -> Tensor:
    """Sums over rows from which `drift_of` computes, (6,); those of several ranks and batches add up.

    HeldOut, sum and square sum of their changes of loss, positions, sum of their KL, and flips.
    """
    targets = _targets(model, rows)
    is_valid = targets != IGNORE
    row_sums, kl, flips = torch.zeros(len(targets), dtype=torch.float64, device=targets.device), 0.0, 0.0
    for part, log_probabilities in _main_log_probabilities(model, rows):
        own = Record(*(tensor[:, part].to(targets.device) for tensor in reference))
        valid = is_valid[:, part]
        row_sums += (_losses(log_probabilities, targets[:, part]) - own.losses).double().sum(1)
        kl += float((_kl(log_probabilities, own) * valid).sum())
        flips += float(((log_probabilities.argmax(-1) != own.entries[..., 0]) & valid).sum())
    counts = is_valid.sum(1)
    changes = row_sums[counts > 0] / counts[counts > 0]
    sums = [len(changes), float(changes.sum()), float(changes.square().sum()), float(counts.sum()), kl, flips]
    return torch.tensor(sums, dtype=torch.float64, device=targets.device)


def drift_of(sums: Tensor, ranks: Ranks) -> Drift:
    """Compute the drift from the sums of all ranks."""
    num_rows, total, squares, positions, kl, flips = ranks.sum(sums).tolist()
    mean = total / max(1, num_rows)
    variance = max(0.0, squares - num_rows * mean**2) / max(1, num_rows - 1)
    margin = Z_95 * math.sqrt(variance / max(1, num_rows))
    positions = max(1, positions)
    return Drift(mean, mean - margin, mean + margin, kl / positions, flips / positions)


def _main_log_probabilities(model: MtpModel, rows: HeldOut) -> Iterator[tuple[slice, Tensor]]:
    """Yield the main head's log-probabilities of some positions of all rows at a time, (R, C, V)."""
    hidden = model.hidden_states(rows.tokens, rows.documents, model.heads.chain(1))[1]  # (R, T, D)
    num_rows, num_positions, _ = hidden.shape
    unembedding, vocab_size = model.unembedding, model.section.vocab_size
    together = chunk_rows(num_rows * num_positions, vocab_size, torch.float32, unembedding.chunk_bytes(hidden) // 2)
    step = max(1, together // num_rows)
    for start in range(0, num_positions, step):
        part = slice(start, min(start + step, num_positions))
        logits = unembedding.logits(1, hidden[:, part])
        yield part, logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _targets(model: MtpModel, rows: HeldOut) -> Tensor:
    """Targets of the main head, (R, T)."""
    return shifted_targets(rows.tokens, rows.documents, model.num_offsets, rows.loss_mask)[0]


def _losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    picked = -log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets != IGNORE, picked, 0)


def _kl(log_probabilities: Tensor, reference: Record) -> Tensor:
    """KL of the reference, which keeps some tokens, from a model, all other tokens taken as one: (R, C)."""
    log_q = log_probabilities.gather(-1, reference.entries.long())
    log_p = reference.log_probabilities.to(log_q.dtype)
    rest_p, rest_q = (_rest(values) for values in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()


def _rest(log_probabilities: Tensor) -> Tensor:
    """Probability of all tokens but the kept ones."""
    return (1 - log_probabilities.exp().sum(-1)).clamp(min=torch.finfo(log_probabilities.dtype).eps)


def drift_section(recipe: Recipe) -> DriftSection | None:
    """Return the settings of a run's drift monitor: its own, or a default where a trained model is adapted; or None.

    A run that keeps the optimizer continues the training of before: no monitor. Nor where nothing is trained that the
    main head reads, as with Medusa heads on a frozen trunk.

    >>> drift_section(Recipe()), drift_section(Recipe.model_validate({"init": {"path": "runs/a"}})).stop_loss
    (None, 0.5)
    """
    drift, init = recipe.health.drift, recipe.init
    if drift != "auto":
        return drift
    is_adapted = init.path is not None and not init.optimizer
    has_own_head = recipe.heads.kind in ("parallel", "chained") or registered(recipe.heads.kind) is not None
    path = {"trunk", "unembedding"} | ({"heads"} if has_own_head else set())
    trains_main = recipe.first_trained_offset is None and not path <= {*recipe.frozen_parts}
    return DriftSection(stop_loss=DEFAULT_STOP_NATS) if is_adapted and trains_main else None


@final
class DriftMonitor(Callback):
    """Compare the main head with that of the model at the start, every so many steps; warn, or stop the run.

    The predictions of the model at the start are kept in every checkpoint, so that a resumed run is compared with the
    same. The stop comes before the next step, so that the figures are in metrics.csv, and before the step is saved.
    """

    recipe_field = "health.drift"

    def __init__(self, recipe: Recipe, section: DriftSection) -> None:
        self._recipe, self._section = recipe, section
        self._reference: Record | None = None  # of all ranks' rows
        self._looked_step = 0
        self._stop: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the predictions of the model at the start, unless a checkpoint has brought them."""
        self._looked_step = trainer.global_step
        if self._reference is None:
            module = cast(MtpLightningModule, pl_module)
            ranks = module.strategy.ranks
            with module.autocast(), evaluating(module.model):
                own = [record(module.model, rows) for rows in self._rows(trainer)]
            parts = [part for of_rank in ranks.gather(own) for part in of_rank]
            self._reference = Record(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare, if it is due."""
        module, step = cast(MtpLightningModule, pl_module), trainer.global_step
        is_due = step - self._looked_step >= self._section.every_steps or step == self._recipe.run.steps
        if is_due and module.metrics:
            self._looked_step = step
            drift = self._look(trainer, module)
            module.metrics |= drift.figures
            self._judge(drift, step, is_first=trainer.is_global_zero)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here if the last comparison says so."""
        self._stop_if_asked()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here if the last comparison says so."""
        self._stop_if_asked()

    def state_dict(self) -> dict[str, Any]:
        """Predictions of the model at the start."""
        return {"reference": None if self._reference is None else tuple(self._reference)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the same model."""
        reference = state_dict["reference"]
        self._reference = None if reference is None else Record(*reference)

    def _look(self, trainer: Trainer, module: MtpLightningModule) -> Drift:
        assert self._reference is not None
        ranks = module.strategy.ranks
        first = ranks.rank * (len(self._reference.losses) // ranks.size)
        sums = torch.zeros(6, dtype=torch.float64, device=module.device)
        with module.autocast(), evaluating(module.model):
            for rows in self._rows(trainer):
                there = slice(first, first + len(rows.tokens))
                sums += drift_sums(module.model, rows, Record(*(tensor[there] for tensor in self._reference)))
                first = there.stop
        return drift_of(sums, ranks)

    def _rows(self, trainer: Trainer) -> Iterator[HeldOut]:
        """Yield this rank's held-out sequences; the same number on every rank."""
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
            yield HeldOut(there["tokens"], there["documents"], there.get("loss_mask"))

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
