"""A rank that trains low-rank updates under zero3 with recomputation, and prints what is whole right before each step.

Arguments: backward orders with commas between; the number of entries up to which DeepSpeed keeps a parameter whole. One
line of JSON: for each order the names of the frozen parameters that were whole before a step of the optimizer, those of
the trained ones, and how many there are of each.
"""

import json
import logging
import os
import sys
import warnings
from unittest import mock

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from mtp_lightning.diagnostics import parity
from mtp_lightning.diagnostics.parity_matrix import Cell, adapted_cell
from mtp_lightning.launch.rank_env import rank_from_env
from mtp_lightning.ranks import Ranks
from mtp_lightning.training.strategies.process_group import process_group
from mtp_lightning.training.strategies.zero import ZeroStrategy

RECIPE = Cell.recipe.fget


def recipe_of(cell, kept_entries):
    """Recompute trunk and heads, and let go of every larger parameter after each use."""
    plain = RECIPE(cell)
    if cell.stage == "single":
        return plain
    zero = {"stage3_param_persistence_threshold": kept_entries, "stage3_max_reuse_distance": 0}
    changes = {
        "memory": {"recompute_trunk": True, "recompute_heads": True},
        "strategy": {"deepspeed": {"zero_optimization": zero}},
    }
    return plain.model_copy(update={name: getattr(plain, name).model_copy(update=own) for name, own in changes.items()})


def outcome_of(backward_order, kept_entries):
    """Train a cell; note what is whole before each step."""
    cell = adapted_cell("zero3", Ranks().size, backward_order, "low-rank updates")
    frozen, whole, step = {}, {True: set(), False: set()}, ZeroStrategy.optimizer_step

    def noted(self, *arguments, **options):
        for name, parameter in self.named_parameters():
            frozen[name] = not parameter.requires_grad
            if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                whole[frozen[name]].add(name)
        return step(self, *arguments, **options)

    recipe = property(lambda cell: recipe_of(cell, kept_entries))
    with mock.patch.object(Cell, "recipe", recipe), mock.patch.object(ZeroStrategy, "optimizer_step", noted):
        done = parity.run_cell(cell)
    return {
        "failure": done.failure,
        "gradients": done.gradients,
        "frozen whole": sorted(whole[True]),
        "trained whole": sorted(whole[False]),
        "frozen": sum(frozen.values()),
        "trained": len(frozen) - sum(frozen.values()),
    }


def main(orders, kept_entries):
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rank = rank_from_env(os.environ)
    cell = adapted_cell("zero3", rank.num_ranks, "joint", "low-rank updates")
    with process_group(cell.recipe):
        found = {order: outcome_of(order, int(kept_entries)) for order in orders.split(",")}
        if Ranks().is_first:
            print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as `mtp` ends its ranks
