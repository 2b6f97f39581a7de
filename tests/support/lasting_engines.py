"""A rank that trains two phases, the first with a rollback, and prints what of each fit is alive when the next begins.

Arguments: folder, cells as kind:precision. Prints one line of JSON: for each cell a list of its fits but the first, of
each the names of what the fit before has left, and the bytes of all tensors there are.
"""

import gc
import json
import os
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch

from mtp_lightning.recipe import load_recipe
from mtp_lightning.training import fit, lightning_module
from mtp_lightning.training.strategies.process_group import process_group
from tests.support.runs import ROOT

RECIPE = """
extends: {root}/recipes/debug/parallel.yaml
run: {{validate_every_steps: 4}}
checkpoint: {{every_steps: 2}}
logging: {{every_steps: 1}}
health: {{nonfinite: {{skip_steps: 0}}}}
phases:
  a: {{run: {{steps: 4}}}}
  b: {{run: {{steps: 2}}}}
"""
BAD_STEP = 3  # counted from 1: after the first checkpoint


class Note(L.Callback):
    """Takes weak references of what must not outlive its fit."""

    def __init__(self, of_fit):
        self.of_fit = of_fit

    def on_train_batch_end(self, trainer, module, *_):
        held = {"module": module, "engine": trainer.strategy.model, "optimizer": trainer.strategy.optimizers[0]}
        self.of_fit |= {name: weakref.ref(own) for name, own in held.items()}
        self.of_fit["parameter"] = weakref.ref(next(module.parameters()))


def note_fits():
    """Return the list that every fit will add to, when it begins, what the one before has left."""
    left, fits, build = [], [], fit.build_trainer

    def build_trainer(*arguments):
        if fits:
            left.append([sorted(name for name, own in fits[-1].items() if own() is not None), live_bytes()])
        fits.append({})
        trainer = build(*arguments)
        trainer.callbacks.append(Note(fits[-1]))
        return trainer

    fit.build_trainer = build_trainer
    return left


def spoil_a_step():
    """Let the losses of one step of every first fit be infinite."""
    accumulate_gradients, seen = lightning_module.accumulate_gradients, []

    def run(model, batch, objective, backward):
        losses = accumulate_gradients(model, batch, objective, backward)
        seen.append(objective)
        steps = len({id(own) for own in seen})
        return losses._replace(nll_sums=losses.nll_sums * torch.inf) if steps == BAD_STEP else losses

    lightning_module.accumulate_gradients = run
    return seen


def live_bytes():
    """Bytes of all tensors of this process."""
    tensors = [own for own in gc.get_objects() if isinstance(own, torch.Tensor)]
    return sum({own.untyped_storage()._cdata: own.untyped_storage().nbytes() for own in tensors}.values())


def main(folder, cells):
    """Train every cell into a folder of its own."""
    path = Path(folder) / "recipe.yaml"
    num_ranks = os.environ["WORLD_SIZE"]
    path.write_text(RECIPE.format(root=ROOT))
    seen, outcome = spoil_a_step(), {}
    left = note_fits()
    with process_group(load_recipe(path, ["strategy.kind=zero1", f"strategy.ranks_per_node={num_ranks}"]).recipe):
        fit.process_group = lambda recipe: nullcontext()  # DeepSpeed does not survive the end of a process group
        for cell in cells.split(","):
            kind, precision = cell.split(":")
            own = (f"strategy.kind={kind}", f"run.precision={precision}", f"run.dir={folder}/{kind}-{precision}")
            ranks = f"strategy.ranks_per_node={num_ranks if kind != 'single' else 1}"
            assert fit.train(load_recipe(path, [*own, ranks])) == 0
            outcome[cell] = list(left)
            left.clear()
            seen.clear()
    if os.environ["RANK"] == "0":
        print(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as `mtp` ends its ranks
