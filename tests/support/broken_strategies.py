"""A rank that trains with strategies broken on purpose and prints what stopped each cell, as one line of JSON."""

import json
import os
import sys
from contextlib import contextmanager, nullcontext

from mtp_lightning.diagnostics.parity import run_cell
from mtp_lightning.diagnostics.parity_matrix import STAGES, Cell
from mtp_lightning.ranks import Ranks
from mtp_lightning.training.step.gradient_checks import GradientChecksum
from mtp_lightning.training.strategies.process_group import process_group
from mtp_lightning.training.strategies.zero import ZeroStrategy


def leave_boundary_alone():
    """Every backward pass is an optimizer step of its own, for all that DeepSpeed knows."""
    ZeroStrategy.accumulating = lambda self: nullcontext()


def let_zero3_overwrite():
    """Gather as zero2 and zero3 do, but leave out that zero3 has to add up."""
    sound = ZeroStrategy.accumulating

    @contextmanager
    def accumulating(self):
        with sound(self):
            if self.stage == 3:
                self._zero.micro_step_id = 0
            yield

    ZeroStrategy.accumulating = accumulating


def scale_gradients():
    """Hand the optimizer gradients that are off by 0.01 %."""
    sound = ZeroStrategy.accumulating

    @contextmanager
    def accumulating(self):
        with sound(self):
            yield
        for shard in self.param_shards():
            shard.gradient.mul_(1.0001)

    ZeroStrategy.accumulating = accumulating


def check_nothing():
    """The gradient-sum check off: what would train on without it."""
    leave_boundary_alone()
    GradientChecksum.compare = lambda self, shards: None


BREAKAGES = (leave_boundary_alone, let_zero3_overwrite, scale_gradients, check_nothing)


def cells(num_ranks):
    """Cells in which something can be lost, and per stage one in which there is only one backward pass.

    ZeRO-1 and chained heads on several ranks only: the others say the same in the same order.
    """
    ways = [
        ("sequential", 1, "parallel", "shared"),
        ("sequential", 1, "chained", "tied"),
        ("bridged", 3, "parallel", "replicated"),
        ("joint", 1, "parallel", "shared"),
    ]
    return [
        Cell(
            stage=stage,
            ranks=num_ranks,
            backward_order=backward_order,
            accumulation=accumulation,
            heads=heads,
            unembedding=unembedding,
            clips=False,
        )
        for stage in (STAGES if num_ranks > 1 else ("zero2", "zero3"))
        for backward_order, accumulation, heads, unembedding in ways
        if heads == "parallel" or num_ranks > 1
    ]


def main(num_ranks):
    chosen, sound = cells(int(num_ranks)), (ZeroStrategy.accumulating, GradientChecksum.compare)
    found = {}
    with process_group(chosen[0].recipe):
        for breakage in BREAKAGES:
            breakage()
            found[breakage.__name__] = [(cell, run_cell(cell)) for cell in chosen]
            ZeroStrategy.accumulating, GradientChecksum.compare = sound
        if Ranks().is_first:
            print(json.dumps({name: [line(*pair) for pair in pairs] for name, pairs in found.items()}))


def line(cell, outcome):
    return cell.stage, cell.backward_order, cell.unembedding, outcome.failure, outcome.gradients


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as `mtp` ends its ranks
