"""A real training run in milliseconds: dropout, AdamW, n heads, endless data without a length."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mtp_lightning.checkpoint.format.folder import newest_complete
from mtp_lightning.recipe.schema.model import HeadsSection
from mtp_lightning.recipe.schema.root import (
    BatchSection,
    CheckpointSection,
    DataSection,
    HealthSection,
    LoggingSection,
    Recipe,
    RunSection,
)
from mtp_lightning.training.build_callbacks import build_callbacks
from mtp_lightning.training.logging.loggers import LoggedRun, build_loggers
from mtp_lightning.training.logging.summary import Summary
from mtp_lightning.training.step.metrics import ThroughputClock
from mtp_lightning.training.step.vote import StepVote
from mtp_lightning.training.strategies.single import SingleStrategy

WIDTH = 6
LAYERS = {"trunk": 2, "heads": 1}


def tiny_recipe(
    num_offsets: int = 3,
    *,
    log_every_steps: int = 2,
    checkpoint_every_steps: int = 2,
    keep_checkpoints: int = 2,
    checkpoint: Mapping[str, Any] | None = None,
    hang_after_s: float | None = 900.0,
    hang_factor: float = 10.0,
    **run: Any,
) -> Recipe:
    """Six steps; a row logged every second, a validation every third, a checkpoint every second."""
    return Recipe(
        name="tiny",
        heads=HeadsSection(num_offsets=num_offsets),
        data=DataSection(seq_len=16),
        batch=BatchSection(global_batch_size=4, micro_batch_size=4),
        run=RunSection(**({"steps": 6, "validate_every_steps": 3} | run)),
        checkpoint=CheckpointSection(
            **({"every_steps": checkpoint_every_steps, "keep": keep_checkpoints} | dict(checkpoint or {}))
        ),
        logging=LoggingSection(every_steps=log_every_steps),
        health=HealthSection(hang_after_s=hang_after_s, hang_factor=hang_factor),
    )


class Rows(IterableDataset[Tensor]):
    """Batch i is a pure function of i; there is no end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[Tensor]:
        index = self.first
        while True:
            yield torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(index))
            index += 1


class TinyData(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.steps_consumed = 0

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Rows(self.steps_consumed), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(2, 4, WIDTH), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        return {"steps_consumed": self.steps_consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps_consumed = state_dict["steps_consumed"]


class TinyModule(LightningModule):
    """One training step is one optimizer step; `seen` keeps (global step, batch index, loss) of each."""

    def __init__(self, recipe: Recipe, length_of_step: Callable[[int], float] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recipe = recipe
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Dropout(0.3))
        self.offset_heads = nn.ModuleList(nn.Linear(16, WIDTH) for _ in range(recipe.heads.num_offsets))
        self.metrics: dict[str, Any] = {}
        self.step_vote, self.throughput = StepVote(), ThroughputClock(recipe, 0)
        self.seen: list[tuple[int, int, float]] = []
        self.num_validations = 0
        self.on_step: Callable[[int], None] = lambda step: None
        self._length_of_step = length_of_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def losses(self, batch: Tensor) -> Tensor:
        hidden = self.trunk(batch)
        return torch.stack([(head(hidden) - batch).square().mean() for head in self.offset_heads])  # (N,)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        step = self.global_step
        self.metrics = {}
        self.step_vote.count(self.step_vote.ballot())
        losses = self.losses(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(losses.sum())
        optimizer.step()
        self.trainer.datamodule.steps_consumed += 1
        self.seen.append((step, batch_idx, losses.sum().item()))
        done = step + 1
        if done % self.recipe.logging.every_steps == 0 or done == self.recipe.run.steps:
            self.metrics = {"step": done, "tokens": done * 64, "lr": 1e-2, "tokens_per_s": 640.0, "memory_gib": 0.5}
            self.metrics |= {"grad_norm/all": 1.0} | self.figures("train", losses, done)
        self.on_step(done)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.val_losses = self.losses(batch)

    def on_validation_epoch_end(self) -> None:
        self.num_validations += 1
        self.metrics |= self.figures("val", self.val_losses, self.global_step)

    def figures(self, split: str, losses: Tensor, step: int) -> dict[str, float]:
        figures = {f"{split}/loss_{k}": loss.item() for k, loss in enumerate(losses, 1)}
        length = 1.0
        for k in range(2, len(losses) + 1):
            share = math.exp(-losses[k - 1].item())
            length += share
            figures |= {f"{split}/acceptance_rate_{k}": share, f"{split}/agreement_{k}": share}
        figures[f"{split}/mean_acceptance_length"] = length
        if self._length_of_step:  # at the same loss, so that the length decides
            figures |= {f"{split}/mean_acceptance_length": self._length_of_step(step), f"{split}/loss_1": 1.0}
        return figures


def fit(
    folder: Path,
    recipe: Recipe,
    *,
    module: TinyModule | None = None,
    extra: list[Callback] | None = None,
    until: int | None = None,
    seed: int = 0,
    summary: bool = False,
) -> tuple[Trainer, TinyModule]:
    """Train in a run folder, from its newest checkpoint if it has one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    module = module or TinyModule(recipe)
    callbacks = build_callbacks(recipe, folder, layers=LAYERS)
    if not summary:  # its picture takes longer than the training
        callbacks = [callback for callback in callbacks if not isinstance(callback, Summary)]
    newest = newest_complete(folder / "checkpoints")
    done, steps = newest.step if newest else 0, until or recipe.run.steps
    loggers = build_loggers(LoggedRun(recipe, folder), folder, after_step=done) if done < steps else []
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[*callbacks, *(extra or [])],
        strategy=SingleStrategy(device="cpu"),
        plugins=[LightningEnvironment()],  # where Slurm is installed Lightning would warn that it is not used
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=recipe.run.validate_every_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # lightning 2.6 with torch 2.13
        trainer.fit(module, datamodule=TinyData(), ckpt_path=newest and newest.path)
    return trainer, module
