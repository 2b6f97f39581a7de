"""muP: what a step does to states and scores does not grow with the width of the model."""

from collections import defaultdict

import pytest
import torch

from mtp_lightning.diagnostics.plain_loop import plain_step, random_batch
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import build_model
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.fit import train
from mtp_lightning.training.step.optimizer import build_optimizer, set_learning_rate
from tests.support.runs import ROOT, figures, mtp

BASE, WIDTHS, STEPS = 32, (32, 128, 512), 4
HEADS = {
    "parallel": {"kind": "parallel"},
    "sequential": {"kind": "sequential", "layers_from_trunk": False},
    "linear": {"kind": "linear"},
}


def recipe_of(width, base, kind="parallel"):
    """Wider by more attention heads, of the same width each."""
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": width // 8, "vocab_size": 31}
    return Recipe.model_validate(
        {
            "model": {**shape, "intermediate_size": 2 * width, "initializer_range": 0.1},
            "heads": {**HEADS[kind], "num_offsets": 2},
            "data": {"seq_len": 16},
            "batch": {"global_batch_size": 4, "micro_batch_size": 4},
            "optimizer": {"lr": 0.01, "warmup_steps": 0, "max_grad_norm": None, "mup_base_width": base},
        }
    )


def trained(recipe):
    """Return the model after steps on one batch, and how far they have moved states and scores (root mean square)."""
    model, batch = build_model(recipe), random_batch(recipe, 0)
    optimizer = build_optimizer(model, recipe.optimizer)
    set_learning_rate(optimizer, recipe.optimizer, recipe.optimizer.lr)
    seen = defaultdict(list)
    parts = {f"layer {n}": layer for n, layer in enumerate(model.trunk.layers)}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, out, name=name: seen[name].append(_states(out).detach().clone()))

    def look():
        with torch.no_grad():
            for offset, hidden in model.hidden_states(batch["tokens"], batch["documents"]).items():
                seen[f"state {offset}"].append(hidden.clone())
                seen[f"scores {offset}"].append(model.unembedding.logits(offset, hidden))

    look()
    for _ in range(STEPS):
        plain_step(model, optimizer, recipe, 0)
    look()
    moved = {name: float((states[-1] - states[0]).square().mean().sqrt()) for name, states in seen.items()}
    return model, moved


def _states(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(
    "kind", ["sequential", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("parallel", "linear"))]
)
def test_steps_move_states_as_far_in_wide_models_as_in_narrow_ones(kind):
    """The coordinate check of Yang 2022, appendix D.1."""
    for base in (BASE, None):
        narrow, *wider = (trained(recipe_of(width, base, kind))[1] for width in WIDTHS)
        growths = [{name: wide[name] / narrow[name] for name in narrow} for wide in wider]
        if base is not None:
            assert max(growth for each in growths for growth in each.values()) < 1.3
        else:
            assert min(growths[-1].values()) > 3
            assert all(growths[-1][name] > growth for name, growth in growths[0].items())


def test_at_the_base_width_nothing_changes():
    with_base, without = (trained(recipe_of(BASE, base))[0] for base in (BASE, None))
    assert all(torch.equal(a, b) for a, b in zip(with_base.parameters(), without.parameters(), strict=True))


def test_weights_that_began_otherwise_are_refused(tmp_path):
    recipe, common = ROOT / "recipes/debug/parallel.yaml", (f"run.cache={tmp_path}", "run.steps=1", "run.threads=1")
    assert train(load_recipe(recipe, [*common, f"run.dir={tmp_path / 'first'}"])) == 0
    starting = (f"run.dir={tmp_path / 'second'}", f"init.path={tmp_path / 'first'}", "optimizer.mup_base_width=16")
    with pytest.raises(CheckpointError, match="that of the model in init.path"):
        train(load_recipe(recipe, [*common, *starting]))


@pytest.mark.slow
def test_zero_steps_by_the_same_rates(tmp_path):
    found = []
    for strategy in ([], ["strategy.kind=zero3", "strategy.ranks_per_node=2", "batch.micro_batch_size=1"]):
        folder = tmp_path / str(len(strategy))
        places = [f"run.dir={folder}", f"run.cache={tmp_path}", "run.steps=5", "logging.every_steps=1"]
        arguments = [str(ROOT / "recipes/debug/parallel.yaml"), *places, "optimizer.mup_base_width=8", *strategy]
        assert mtp("train", *arguments, cwd=ROOT).returncode == 0
        found.append([float(row["train/loss_1"]) for row in figures(folder / "metrics.csv") if row["train/loss_1"]])
    assert len(found[0]) == 5
    assert found[0] == pytest.approx(found[1], rel=1e-5)
