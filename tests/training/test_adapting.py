"""Adapted runs: from a plain model to updates and mixtures, in phases, resumed to the bit, and back to plain."""

import itertools

import pytest
import torch

from mtp_lightning.checkpoint.convert.consolidate import consolidate
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.decode import generate
from mtp_lightning.errors import CheckpointError, TrainingError
from mtp_lightning.model.roles import role_of
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.loading.phases import phases_of
from mtp_lightning.training.fit import train
from mtp_lightning.training.health.drift import HeldOut, evaluating, record
from tests.support.runs import ROOT, figures, mtp

RECIPE = """
extends: {root}/recipes/debug/parallel.yaml
heads: {{num_offsets: 2}}
optimizer: {{warmup_steps: 0, min_lr_ratio: 1.0}}
run: {{validate_every_steps: 4, threads: 1, cache: {cache}, steps: 8}}
checkpoint: {{every_steps: 4}}
logging: {{every_steps: 1}}
"""
UPDATED = ("adapt.lora={rank: 2, dropout: 0.2}", "freeze=[unembedding]")
ZERO = ("strategy.ranks_per_node=2", "batch.micro_batch_size=2")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a recipe and a run of it, the plain model."""
    folder = tmp_path_factory.mktemp("adapting")
    (folder / "recipe.yaml").write_text(RECIPE.format(root=ROOT, cache=folder / "cache"))
    run(folder, "base", "run.steps=4")
    return folder


def run(here, name, *overrides, phases=""):
    recipe = here / f"{name}.yaml"
    recipe.write_text("extends: recipe.yaml\n" + phases)
    assert train(load_recipe(recipe, [f"run.dir={here / name}", *overrides])) == 0
    return here / name


def adapted(here, name, *overrides, phases=""):
    return run(here, name, f"init.path={here / 'base'}", *overrides, phases=phases)


def weights_of(folder):
    return dict(load_model(folder)[1].named_parameters())


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert moved(found, expected) == set()


def test_updates_begin_fresh_and_by_name_and_what_is_frozen_stays(here, capsys):
    after = weights_of(adapted(here, "updated", *UPDATED, "health.drift={}"))
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("Starting from")]
    assert "fresh: trunk.layers.0.self_attn.q_proj.lora.down, trunk.layers.0.self_attn.q_proj.lora.up" in line
    before = weights_of(here / "base")
    assert after.keys() - before.keys() == {name for name in after if role_of(name) == "lora"}
    assert moved(before, after) == {name for name in before if role_of(name) == "heads"}
    assert all(value.abs().max() > 0 for value in after.values())
    first, *_ = [row for row in figures(here / "updated/metrics.csv") if row["grad_norm/lora"]]
    assert float(first["grad_norm/lora"]) > 0
    assert first["grad_norm/trunk"] == "" == first["grad_norm/unembedding"]


@pytest.mark.slow
def test_a_run_with_dropout_is_resumed_to_the_bit(here):
    adapted(here, "whole", *UPDATED)
    adapted(here, "halves", *UPDATED, "run.steps=8", "optimizer.min_lr_ratio=1.0")
    newest = sorted((here / "halves/checkpoints").glob("step-*"))[-1]
    for path in sorted(newest.iterdir()):
        path.unlink()
    newest.rmdir()
    adapted(here, "halves", *UPDATED)
    assert_same(weights_of(here / "halves"), weights_of(here / "whole"))


@pytest.mark.slow
def test_phases_from_heads_alone_to_updates(here):
    """Head warm-up, then all at another rate; a third phase goes on with the optimizer of the second."""
    phases = """
freeze: [unembedding]
phases:
  heads: {freeze: [trunk, unembedding], run: {steps: 4}}
  joint:
    adapt: {lora: {rank: 2}}
    optimizer: {lr_scale: {heads: 4, lora: 2}}
    run: {steps: 4}
    health: {drift: {stop_loss: 9}}
  more: {adapt: {lora: {rank: 2}}, optimizer: {lr_scale: {heads: 4, lora: 2}}, keep_optimizer: true, run: {steps: 4}}
"""
    folder = adapted(here, "phases", phases=phases)
    states = [weights_of(path) for path in (here / "base", *sorted(folder.glob("phases/*")))]
    changed = [{role_of(name) for name in moved(a, b)} for a, b in itertools.pairwise(states)]
    assert changed == [{"heads"}, {"heads"}, {"heads", "lora"}]
    assert {role_of(name) for name in states[2].keys() - states[1].keys()} == {"lora"}
    recipes = [phase.recipe for phase in phases_of(load_recipe(folder / "recipe.yaml").recipe)]
    assert [recipe.adapt.lora is not None for recipe in recipes] == [False, True, True]


def test_mixtures_are_learnt_and_decoded_with(here):
    """Law 6 with what a run has learnt: drafts change nothing of the text."""
    recipe, model = load_model(adapted(here, "mixed", "adapt.layer_mix={temperature: 0.01}", *UPDATED[1:]))
    learnt = [mixture.weight for mixture in model.layer_mix.values()]
    assert len(learnt) == 2
    assert all(weight.std() > 1e-4 for weight in learnt)
    prompts = [[100, 101, 102], [104], [32, 32, 105, 110]]
    plain = generate(model, prompts, max_new_tokens=24, decoder="greedy")
    made = generate(model, prompts, max_new_tokens=24, decoder="blockwise")
    assert made.tokens == plain.tokens
    assert made.statistics.num_draft_tokens > 0
    assert recipe.adapt.layer_mix.temperature == 0.01


def test_an_adapted_run_speaks_as_its_export_does(here):
    adapted(here, "spoken", *UPDATED)
    consolidate(here / "spoken", here / "exported")
    prompts = [[100, 101, 102], [104]]
    own, plain = (generate(load_model(here / name)[1], prompts, max_new_tokens=12) for name in ("spoken", "exported"))
    assert own.tokens == plain.tokens
    run(here, "again", f"init.path={here / 'exported'}", "run.steps=4")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "only in the checkpoint: trunk.layers.0.self_attn.k_proj.lora.down"),
        (("adapt.lora={rank: 3}",), "of another shape"),
        (("adapt.lora={rank: 2, targets: [q, k, v, o]}",), "only in the model: trunk.layers.0.self_attn.o_proj.lora"),
        (("adapt.lora={rank: 2, alpha: 3}",), "adapt.lora.alpha 16.0 there and 3.0 here"),
    ],
)
def test_other_updates_than_those_of_the_start_are_refused(here, overrides, words):
    if not (here / "refused").exists():
        adapted(here, "refused", *UPDATED, "run.steps=4")
    with pytest.raises(CheckpointError) as caught:
        run(here, "other", f"init.path={here / 'refused'}", *overrides)
    assert words in caught.value.found
    assert "mtp export" in caught.value.hint


def test_what_is_measured_without_dropout_is_measured_again(here):
    """The guard compares a model in training with what was noted of one in training."""
    if not (here / "dropping").exists():
        adapted(here, "dropping", "adapt.lora={rank: 2, dropout: 0.5}", "run.steps=4")
    model = load_model(here / "dropping")[1].train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (2, 66), generator=generator)
    rows = HeldOut(tokens, torch.zeros_like(tokens), None)
    assert not torch.equal(record(model, rows).losses, record(model, rows).losses)
    with evaluating(model):
        noted = [record(model, rows).losses for _ in range(2)]
    assert torch.equal(*noted)
    assert model.training


def test_a_frozen_parameter_that_changes_stops_the_run(here, monkeypatch):
    from mtp_lightning.training.lightning_module import MtpLightningModule

    step = MtpLightningModule.training_step

    def spoiling(self, batch, batch_idx):
        step(self, batch, batch_idx)
        with torch.no_grad():
            self.model.trunk.layers[0].self_attn.q_proj.weight[0, 0] += 1

    monkeypatch.setattr(MtpLightningModule, "training_step", spoiling)
    with pytest.raises(TrainingError, match="frozen parameters must be the same bytes"):
        adapted(here, "spoilt", *UPDATED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_ranks_adapt_as_one_does(here, kind):
    """Without dropout, whose zeros differ between ranks; weights up to the order of sums."""
    options = ("adapt.lora={rank: 2}", "freeze=[unembedding]", "adapt.layer_mix={}", "run.steps=4")
    adapted(here, "single", *options) if not (here / "single").exists() else None
    start = f"init.path={here / 'base'}"
    arguments = [str(here / "recipe.yaml"), f"run.dir={here / kind}", start, *options, f"strategy.kind={kind}", *ZERO]
    done = mtp("train", *arguments, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    own, expected = weights_of(here / kind), weights_of(here / "single")
    assert own.keys() == expected.keys()
    before = weights_of(here / "base")
    for name, value in expected.items():
        if role_of(name) in ("trunk", "unembedding"):
            assert torch.equal(own[name], before[name]), name
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=2e-4)
