"""A script of a Lightning user: fit with DDP on two gloo ranks, and write what the first rank saw of gradients.

Arguments: recipe file, folder to write into, number of ranks, overrides. In the folder: gradients.pt, of the last step
before clipping; weights.pt; and facts.json: for every step whether the ranks' gradients differed before they were
averaged, and how many entries of gradients were reduced.
"""

import json
import sys
import time
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist

from mtp_lightning import MtpDataModule, MtpLightningModule, load_recipe, recipe_callbacks
from mtp_lightning.training.strategies import own_trainer

SLEEP_S = 0.5  # of the last rank, before every step


class Straggler(L.Callback):
    """Holds the last rank up while it waits for rows."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == trainer.world_size - 1:
            time.sleep(SLEEP_S)


class Watch(L.Callback):
    """Keeps the gradients of the last step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}


def watch_averaging():
    """Note what is handed over to be averaged."""
    averaged, steps = own_trainer.average_gradients, []

    def average(parameters):
        gradients = [p.grad for p in parameters if p.grad is not None]
        own = torch.cat([gradient.flatten() for gradient in gradients])
        others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(others, own)
        # a reduction inside the backward passes would have made them equal
        is_equal = [torch.equal(others[0][p], others[1][p]) for p in _slices(gradients)]
        steps.append({"equal_before": sum(is_equal), "entries": own.numel()})
        averaged(parameters)

    own_trainer.average_gradients = average
    return steps


def _slices(gradients):
    ends = torch.tensor([gradient.numel() for gradient in gradients]).cumsum(0).tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def main(recipe_file, folder, num_ranks, *overrides):
    recipe = load_recipe(recipe_file, overrides).recipe
    steps, watch, module = watch_averaging(), Watch(), MtpLightningModule(recipe)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=int(num_ranks),
        max_steps=recipe.run.steps,
        callbacks=[watch, Straggler(), *recipe_callbacks(recipe)],
        default_root_dir=folder,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=MtpDataModule(recipe))
    if trainer.is_global_zero:
        torch.save(watch.gradients, Path(folder, "gradients.pt"))
        torch.save(module.model.state_dict(), Path(folder, "weights.pt"))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        Path(folder, "facts.json").write_text(json.dumps({"steps": steps, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
