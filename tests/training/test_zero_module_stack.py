"""DeepSpeed's stack of modules does not grow with the steps where layers are recomputed."""

import pytest

from tests.support import warm
from tests.support.runs import ROOT

RANK = """
from unittest import mock
from mtp_lightning.diagnostics import parity
from mtp_lightning.diagnostics.parity_matrix import Cell
from mtp_lightning.training.strategies.process_group import process_group
from mtp_lightning.training.strategies.zero import ZeroStrategy, _offload
from mtp_lightning.training.strategies.zero_modules import module_stack

cell = Cell(stage="zero3", ranks=1, backward_order="sequential", accumulation=3, heads="parallel", unembedding="shared",
            clips=False)
plain, lengths, step = Cell.recipe.fget, [], ZeroStrategy.optimizer_step

def recipe(self):
    memory = {"recompute_trunk": True, "recompute_heads": True}
    return plain(self).model_copy(update={"memory": plain(self).memory.model_copy(update=memory)})

def noted(self, *arguments, **options):
    lengths.append(len(module_stack(_offload())))
    return step(self, *arguments, **options)

with mock.patch.object(Cell, "recipe", property(recipe)), mock.patch.object(ZeroStrategy, "optimizer_step", noted):
    with process_group(cell.recipe):
        outcome = parity.run_cell(cell)
assert outcome.is_good, outcome
print("lengths", *lengths)
"""


@pytest.mark.slow
def test_recomputed_layers_leave_nothing_behind_from_step_to_step():
    done = warm.run(cwd=ROOT, code=RANK, trains=True)
    assert done.returncode == 0, done.stderr
    lengths = next(line for line in done.stdout.splitlines() if line.startswith("lengths")).split()[1:]
    assert len(lengths) == 3
    assert len(set(lengths)) == 1, lengths
