"""A rank that trains one step and prints how many entries of unsharded gradients it held at most, as a line of JSON."""

import json
import os
import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from mtp_lightning.diagnostics.parity import RandomData
from mtp_lightning.ranks import Ranks
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.strategies.process_group import process_group
from mtp_lightning.training.strategies.zero import build_strategy
from tests.support.tiny import tiny_recipe


class Peak(Callback):
    """Looks at all parameters whenever one receives its gradient, and after every backward pass."""

    def __init__(self):
        self.most_entries = self.most_heads = self.most_after_a_pass = 0

    def on_train_start(self, trainer, pl_module):
        self.zero = trainer.strategy.deepspeed_engine.optimizer
        self.parameters = dict(pl_module.model.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.register_hook(lambda gradient, name=name: self.arrives(name, gradient))

    def arrives(self, name, gradient):
        """The strategy has not seen this gradient yet; what it has not given up of the others adds to it."""
        held = self.held() | {name: gradient.numel()}
        self.most_entries = max(self.most_entries, sum(held.values()))
        self.most_heads = max(self.most_heads, len({n.split(".")[2] for n in held if n.startswith("heads.")}))

    def on_after_backward(self, trainer, pl_module):
        self.most_after_a_pass = max(self.most_after_a_pass, sum(self.held().values()))

    def held(self):
        """Entries of every gradient but those that lie in this rank's own shard of them."""
        shard = getattr(self.zero, "grads_in_partition", None)
        own = None if shard is None else shard.untyped_storage().data_ptr()
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        return {n: g.numel() for n, g in gradients.items() if g.untyped_storage().data_ptr() != own}


def main(stage, bucket):
    options = {"reduce_bucket_size": int(bucket), "stage3_param_persistence_threshold": 0}
    recipe = tiny_recipe(
        model={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "vocab_size": 101},
        batch={"global_batch_size": 8, "micro_batch_size": 2},
        run={"steps": 1, "device": "cpu", "threads": 1},
        strategy={"kind": stage, "ranks_per_node": 2, "deepspeed": {"zero_optimization": options}},
    )
    with process_group(recipe):
        peak, module = Peak(), MtpLightningModule(recipe)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=build_strategy(recipe, torch.device("cpu")),
            precision="32-true",
            max_steps=1,
            callbacks=[peak],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=RandomData(recipe, Ranks()))
        if Ranks().is_first:
            print(json.dumps([peak.most_entries, peak.most_heads, peak.most_after_a_pass]))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as `mtp` ends its ranks
