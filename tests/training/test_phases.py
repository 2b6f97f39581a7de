"""Runs in phases: each phase is the run that its own recipe would be, resumed inside and between phases to the bit."""

import itertools
import json

import pytest
import torch

from mtp_lightning.checkpoint.convert.add_heads import extend_checkpoint
from mtp_lightning.checkpoint.convert.consolidate import consolidate
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.errors import CheckpointError, RunFolderError
from mtp_lightning.launch.status import statuses
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.loading.phases import phases_of
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT, figures, last_step, mtp, mtp_killed

RECIPE = """
extends: {root}/recipes/debug/sequential.yaml
heads: {{num_offsets: 3}}
optimizer: {{warmup_steps: 0, min_lr_ratio: 1.0}}
run: {{validate_every_steps: 4, threads: 1, cache: {cache}}}
checkpoint: {{every_steps: 4}}
logging: {{every_steps: 1}}
phases:
"""
TWO_HALVES = "  a: {run: {steps: 6}}\n  b: {run: {steps: 6}, keep_optimizer: true}\n"
MIXED = """
  heads: {run: {steps: 8}, freeze: [offsets_below_2]}
  joint: {run: {steps: 12}, optimizer: {lr: 1e-3}, objective: {distill: {beta: [0.5]}}}
  six:   {run: {steps: 8}, extend_to: 6}
  again: {run: {steps: 4}, keep_optimizer: true, freeze: [offsets_below_4]}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def written(tmp_path, cache):
    """Writer of a recipe with the phases given."""

    def write(phases, name="recipe.yaml"):
        (tmp_path / name).write_text(RECIPE.format(root=ROOT, cache=cache) + phases)
        return tmp_path / name

    return write


def trained(path, folder, *overrides):
    assert train(load_recipe(path, [f"run.dir={folder}", *overrides])) == 0
    return folder


def weights_of(folder):
    return dict(load_model(folder)[1].named_parameters())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


ZERO = ("strategy.kind=zero2", "strategy.ranks_per_node=2", "batch.micro_batch_size=4")


@pytest.mark.slow
def test_two_phases_that_change_nothing_are_one_run(written, tmp_path):
    whole = written("  {}\n")
    assert load_recipe(whole).recipe.phases == {}
    trained(whole, tmp_path / "whole", "run.steps=12")
    trained(written(TWO_HALVES), tmp_path / "halves")
    assert_same(weights_of(tmp_path / "halves"), weights_of(tmp_path / "whole"))
    second = figures(tmp_path / "halves/phases/2-b/metrics.csv")
    losses = [row["train/loss_1"] for row in figures(tmp_path / "whole/metrics.csv") if row["train/loss_1"]]
    assert [row["train/loss_1"] for row in second if row["train/loss_1"]] == losses[6:]


@pytest.mark.slow
def test_two_phases_on_two_ranks_that_change_nothing_are_one_run(written, tmp_path):
    for name, phases, extra in (("whole", "  {}\n", ("run.steps=12",)), ("halves", TWO_HALVES, ())):
        done = mtp("train", str(written(phases)), f"run.dir={tmp_path / name}", *ZERO, *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same(weights_of(tmp_path / "halves"), weights_of(tmp_path / "whole"))


@pytest.mark.slow
def test_without_keep_optimizer_only_weights_come_along(written, tmp_path):
    """A phase starts like a run that knows nothing but the exported weights, at the same place in the data."""
    trained(written("  a: {run: {steps: 6}}\n  b: {run: {steps: 6}}\n"), tmp_path / "phases")
    consolidate(tmp_path / "phases/phases/1-a", tmp_path / "exported")
    plain = written("  {}\n", "plain.yaml")
    own = ("run.steps=6", f"init.path={tmp_path / 'exported'}")
    trained(plain, tmp_path / "alone", *own)
    other = ("run.steps=6", f"init.path={tmp_path / 'phases/phases/1-a'}")
    trained(plain, tmp_path / "from_run", *other)
    assert_same(weights_of(tmp_path / "from_run"), weights_of(tmp_path / "alone"))
    trained(plain, tmp_path / "kept", *other, "init.data_position=true")
    assert_same(weights_of(tmp_path / "kept"), weights_of(tmp_path / "phases"))
    moved = weights_of(tmp_path / "alone")["heads.blocks.0.eh_proj.weight"]
    assert not torch.equal(moved, weights_of(tmp_path / "kept")["heads.blocks.0.eh_proj.weight"])  # other rows


@pytest.mark.slow
def test_an_extension_in_a_phase_is_the_verb_followed_by_training(written, tmp_path):
    trained(written("  a: {run: {steps: 6}}\n  more: {run: {steps: 4}, extend_to: 6}\n"), tmp_path / "run")
    extend_checkpoint(tmp_path / "run/phases/1-a", tmp_path / "extended", 6)
    own = (f"init.path={tmp_path / 'run/phases/1-a'}", "heads.extend=2", "init.data_position=true", "run.steps=4")
    trained(tmp_path / "extended/recipe.yaml", tmp_path / "verb", *own)
    assert_same(weights_of(tmp_path / "run"), weights_of(tmp_path / "verb"))
    phases = phases_of(load_recipe(tmp_path / "run/recipe.yaml").recipe)
    assert phases[1].recipe.heads == load_recipe(tmp_path / "verb/recipe.yaml").recipe.heads
    assert [phase.recipe.model.num_hidden_layers for phase in phases] == [6, 9]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "recipe.yaml").write_text(RECIPE.format(root=ROOT, cache=cache) + MIXED)
    return trained(folder / "recipe.yaml", folder / "run")


def test_frozen_parts_stay_and_each_phase_trains_its_own(uninterrupted):
    after = [weights_of(path) for path in sorted(uninterrupted.glob("phases/*"))]
    changed = [
        {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
        for old, new in itertools.pairwise(after)
    ]
    assert changed == [{"trunk", "heads", "unembedding"}, set(), {"heads", "unembedding"}]
    added = after[2].keys() - after[1].keys()
    moved = {name for name in after[2] if not torch.equal(after[2][name], after[3][name])}
    assert moved == added != set()


def test_a_summary_of_all_phases_is_left(uninterrupted):
    content = json.loads((uninterrupted / "summary.json").read_text())
    assert content["is_finished"]
    assert {name: phase["steps"] for name, phase in content["phases"].items()} == {
        "heads": 8, "joint": 12, "six": 8, "again": 4,
    }  # fmt: skip
    (status,) = statuses([uninterrupted])
    assert (status.name, status.state, status.step, status.steps) == ("debug-sequential/again", "finished", 4, 4)


def test_a_phase_that_could_not_write_its_end_does_so_later(uninterrupted):
    """As where the disk was full, or a kill came, between the last checkpoint and the summary."""
    phase = sorted(uninterrupted.glob("phases/*"))[1]
    whole, best = json.loads((phase / "summary.json").read_text()), (phase / "checkpoints/best").read_text()
    (phase / "summary.json").write_text(json.dumps(whole | {"is_finished": False, "steps": 3}))
    for name in ("checkpoints/last", "checkpoints/best"):
        (phase / name).unlink()
    assert train(load_recipe(uninterrupted / "recipe.yaml")) == 0
    written = json.loads((phase / "summary.json").read_text())
    assert {**written, "wall_s": 0, "checkpoints_s": 0} == {**whole, "wall_s": 0, "checkpoints_s": 0}
    assert written["wall_s"]["total"] > 0
    last = f"step-{whole['steps']:08d}\n"
    assert ((phase / "checkpoints/last").read_text(), (phase / "checkpoints/best").read_text()) == (last, best)


def test_a_finished_run_in_phases_does_nothing_more(uninterrupted, capsys):
    assert train(load_recipe(uninterrupted / "recipe.yaml")) == 0
    assert "All 4 phases are finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("phase", "after_step", "seed"),
    [
        pytest.param("2-joint", 1, 1, marks=pytest.mark.slow),
        pytest.param("1-heads", 4, 0, marks=pytest.mark.slow),
        pytest.param("3-six", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_in_a_phase_it_goes_on_to_the_bit(uninterrupted, tmp_path, phase, after_step, seed):
    command = ("train", str(uninterrupted / "recipe.yaml"), f"run.dir={tmp_path / 'run'}")
    metrics = tmp_path / "run/phases" / phase / "metrics.csv"
    assert mtp_killed(*command, cwd=tmp_path, metrics=metrics, after_step=after_step, seed=seed) == -9
    assert last_step(metrics) >= after_step
    done = mtp("train", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(weights_of(tmp_path / "run"), weights_of(uninterrupted))
    for own in sorted(uninterrupted.glob("phases/*")):
        assert figures(tmp_path / "run/phases" / own.name / "metrics.csv") == figures(own / "metrics.csv")


def test_a_finished_phase_must_stay_what_it_was(uninterrupted):
    changed = (uninterrupted / "recipe.yaml").read_text().replace("steps: 8", "steps: 7", 1)
    (uninterrupted / "changed.yaml").write_text(changed)
    with pytest.raises(RunFolderError, match="run must go on with the recipe"):
        train(load_recipe(uninterrupted / "changed.yaml", ["optimizer.eps=1e-6"]))


@pytest.mark.slow
def test_state_that_is_not_there_is_named(uninterrupted, written, tmp_path):
    consolidate(uninterrupted / "phases/2-joint", tmp_path / "exported")
    plain = written("  {}\n")
    for field, what in (("init.optimizer", "no optimizer's state of "), ("init.data_position", "no position")):
        with pytest.raises(CheckpointError, match=what):
            trained(plain, tmp_path / field, f"init.path={tmp_path / 'exported'}", f"{field}=true")
    more = ("heads.num_offsets=5", "model.num_hidden_layers=8", "heads.extend=4")
    with pytest.raises(CheckpointError, match="heads.extend = 4, and 2 in"):
        trained(plain, tmp_path / "wide", f"init.path={uninterrupted / 'phases/2-joint'}", *more)
