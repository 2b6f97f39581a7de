"""A rank that trains with an infinite loss in one step, whose gradients are finite; one run for each cell.

Arguments: folder, corpus, cells as kind:precision, fields of the recipe.
"""

import os
import sys
from contextlib import nullcontext

import torch

from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training import fit, lightning_module
from mtp_lightning.training.strategies.process_group import process_group
from tests.support.runs import ROOT

STEP = 3  # counted from 0


def spoil_losses(step=STEP):
    """Let the loss of one step be infinite on the last rank."""
    accumulate_gradients, prepare = lightning_module.accumulate_gradients, lightning_module.prepare_batch
    steps = []

    def prepared(batch, recipe, step, sequence):
        is_last = Ranks().rank == Ranks().size - 1
        steps.append(step if is_last else -1)
        return prepare(batch, recipe, step, sequence)

    def run(*arguments):
        losses = accumulate_gradients(*arguments)
        return losses._replace(nll_sums=losses.nll_sums * torch.inf) if steps[-1] == step else losses

    lightning_module.prepare_batch = prepared
    lightning_module.accumulate_gradients = run


def main(folder, cells, *fields):
    """Train every cell into a folder of its own."""
    spoil_losses()
    num_ranks = os.environ["WORLD_SIZE"]
    path = ROOT / "recipes/debug/parallel.yaml"
    with process_group(load_recipe(path, ["strategy.kind=zero1", f"strategy.ranks_per_node={num_ranks}"]).recipe):
        fit.process_group = lambda recipe: nullcontext()  # DeepSpeed does not survive the end of a process group
        for cell in cells.split(","):
            kind, precision = cell.split(":")
            own = (f"strategy.kind={kind}", f"run.precision={precision}", f"run.dir={folder}/{kind}-{precision}")
            ranks = f"strategy.ranks_per_node={num_ranks if kind != 'single' else 1}"
            assert fit.train(load_recipe(path, [*fields, *own, ranks])) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as `mtp` ends its ranks
