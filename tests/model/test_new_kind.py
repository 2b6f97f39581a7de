"""A head kind written the way `model/heads/__init__.py` tells, run by the schedules unchanged."""

import pytest
from torch import nn

from mtp_lightning.model.heads import KINDS, TRUNK, Heads
from tests.support.tiny import gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows


class GatedHeads(Heads):
    """A kind of a test's own: one gate per extra offset on the trunk's output."""

    def __init__(self, model, heads, *, recompute):
        super().__init__(heads)
        self.gates = nn.ModuleList(
            nn.Linear(model.hidden_size, model.hidden_size) for _ in range(heads.num_offsets - 1)
        )

    def source(self, offset):
        return TRUNK

    def modules_of(self, offset):
        return [self.gates[offset - 2]] if offset > 1 else []

    def forward(self, offset, state, context):
        return state if offset == 1 else state * self.gates[offset - 2](state).sigmoid()


@pytest.mark.parametrize("schedule", ["sequential", "bridged"])
def test_schedules_run_a_new_kind_unchanged(monkeypatch, schedule):
    monkeypatch.setitem(KINDS, "linear", GatedHeads)  # takes no layers from the trunk, like linear heads
    gradients = {}
    for name in ("joint", schedule):
        recipe = tiny_recipe(heads={"kind": "linear"}, objective={"backward_order": name})
        _, gradients[name] = gradients_of(tiny_model(recipe), recipe, tiny_rows(recipe, 2))
    assert "heads.gates.2.bias" in gradients["joint"]
    for name, expected in gradients["joint"].items():
        assert relative_error(gradients[schedule][name], expected) < 1e-10, name
