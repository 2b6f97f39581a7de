"""A loss or gradient that is not finite: the step has no effect, then the run goes back and on without its rows.

The embedding of one byte is infinite, and a single document holds that byte: one row of an epoch poisons its step.
"""

import itertools
import json

import numpy as np
import pytest
import torch

from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.sampling.order import ShuffledOrder
from mtp_lightning.errors import NonFiniteError, RunFolderError
from mtp_lightning.launch.run_marker import claim
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.schema.root import NonFiniteSection
from mtp_lightning.training import fit, lightning_module
from mtp_lightning.training.fit import train
from mtp_lightning.training.health import rollback
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.saving.save_checkpoints import Checkpoints
from mtp_lightning.training.step.skipped_steps import NonFiniteStreak, SkippedSteps
from mtp_lightning.training.strategies.single import SingleStrategy
from tests.support.ranked import on_ranks
from tests.support.runs import ROOT, figures, mtp

BAD = "~"
STEPS, ROWS = 12, 4
SHORT = (
    f"run.steps={STEPS}",
    f"batch.global_batch_size={ROWS}",
    "batch.micro_batch_size=2",
    "logging.every_steps=1",
    "run.validate_every_steps=6",
    "checkpoint.every_steps=2",
    "run.threads=1",
)
WITHOUT_SKIPS = "health.nonfinite.skip_steps=0"
RECIPE = ROOT / "recipes/debug/parallel.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus of which one document holds the byte."""
    folder = tmp_path_factory.mktemp("nonfinite")
    texts = [f"document {i} of many " * 9 for i in range(240)]
    texts[121] = texts[121].replace("of many", f"of {BAD} any", 1)
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def recipe_of(place, name, *overrides):
    fixed = (f"data.corpus=[{place}/texts.jsonl]", f"run.cache={place}/cache", f"run.dir={place}/{name}")
    return load_recipe(RECIPE, [*SHORT, *fixed, *overrides])


def poisoned(recipe, build=SingleStrategy.build_model):
    """Build the model with an infinite embedding of the byte."""
    model = build(None, recipe)
    with torch.no_grad():
        model.trunk.embed_tokens.weight[ord(BAD)] = torch.inf
    return model


@pytest.fixture
def poison(monkeypatch):
    monkeypatch.setattr(SingleStrategy, "build_model", lambda self, recipe: poisoned(recipe))


@pytest.fixture(scope="module")
def seed(place):
    """A seed that puts the row that holds the byte into step 8, which is not the first after a checkpoint."""
    data = MtpDataModule(recipe_of(place, "unused").recipe)
    data.prepare_data()
    num_rows = len(data.training_rows)
    tokens = data.training_rows.read(np.arange(num_rows))["tokens"][:, :-4]
    [bad] = np.flatnonzero((tokens == ord(BAD)).any(1))
    samples = np.arange(7 * ROWS, 8 * ROWS)
    orders = (ShuffledOrder(seed=seed, num_rows=num_rows).rows(samples) for seed in itertools.count())
    return next(seed for seed, rows in enumerate(orders) if bad in rows)


def weights(run, step=STEPS):
    reader = ShardReader(run / f"checkpoints/step-{step:08d}")
    return {name: reader.read(name) for name in reader.names}


def assert_same_weights(run, other):
    own, theirs = weights(run), weights(other)
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def skipping_from_the_start(monkeypatch, first, count):
    """Let runs leave rows out before they begin."""

    def build(recipe):
        data = MtpDataModule(recipe)
        data.skip_rows(first, count)
        return data

    monkeypatch.setattr(fit, "MtpDataModule", build)


@pytest.fixture
def reference(place, seed, poison, monkeypatch):
    """A run in which the rows of the bad step were left out from the start."""
    run = place / "reference"
    if not run.exists():
        with monkeypatch.context() as patch:
            skipping_from_the_start(patch, 7 * ROWS, ROWS)
            assert train(recipe_of(place, "reference", f"run.seed={seed}")) == 0
    return run


def test_the_run_goes_back_and_leaves_the_rows_out(place, seed, reference, poison, capsys):
    assert train(recipe_of(place, "back", f"run.seed={seed}", WITHOUT_SKIPS)) == 0
    out = capsys.readouterr().out
    assert out.count("Rolling back to step 6 (1 of 3 times)") == 1
    assert f"Rows {7 * ROWS} to {8 * ROWS - 1} of the run are left out" in out
    assert_same_weights(place / "back", reference)
    rows, expected = figures(place / "back/metrics.csv"), figures(reference / "metrics.csv")
    assert [row.pop("rollbacks") for row in rows] == ["0"] * 6 + ["1"] * 6
    assert {row.pop("rollbacks") for row in expected} == {"0"}
    assert rows == expected


@pytest.mark.slow
def test_a_kill_after_the_record_forgets_nothing(place, seed, reference, poison, monkeypatch):
    def killed(*arguments):
        rollback.roll_back(*arguments)
        raise RuntimeError("killed")

    loaded = recipe_of(place, "killed", f"run.seed={seed}", WITHOUT_SKIPS)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "roll_back", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(loaded)
    assert train(loaded) == 0
    assert len(rollback.read_rollbacks(place / "killed")) == 1
    assert_same_weights(place / "killed", reference)


@pytest.mark.slow
def test_a_restart_after_the_next_checkpoint_leaves_the_rows_out_once(place, seed, reference, poison, monkeypatch):
    """The checkpoint knows by then what is left out: doing so again would leave other rows out."""
    loaded = recipe_of(place, "restarted", f"run.seed={seed}", WITHOUT_SKIPS)
    save = Checkpoints.save

    def stopping(self, trainer):
        save(self, trainer)
        if trainer.global_step == 8:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(RuntimeError, match="killed"):
            train(loaded)
    assert train(loaded) == 0
    assert_same_weights(place / "restarted", reference)


def test_a_single_step_is_skipped_and_its_save_waits(place, seed, poison, capsys):
    assert train(recipe_of(place, "skipped", f"run.seed={seed}", "checkpoint.keep=9")) == 0
    rows = figures(place / "skipped/metrics.csv")
    assert [row["skipped_steps"] for row in rows] == ["0"] * 7 + ["1"] * 5
    assert {row["rollbacks"] for row in rows} == {"0"}
    assert [row["train/loss_1"] for row in rows].index("") == 7
    assert capsys.readouterr().out.count("Step 8 skipped: a gradient of ") == 1
    assert [found.step for found in complete_checkpoints(place / "skipped/checkpoints")] == [2, 4, 6, 9, 10, 12]


CELLS = [f"{kind}:{precision}" for kind in ("zero1", "zero2", "zero3") for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(
    ("num_ranks", "cells"),
    [
        pytest.param(1, ["single:fp32", "single:bf16", "zero2:bf16"], marks=pytest.mark.slow),
        pytest.param(1, CELLS, marks=pytest.mark.slow),
        pytest.param(2, CELLS, marks=pytest.mark.slow),
    ],
)
def test_an_infinite_loss_is_enough_to_skip_and_nothing_has_changed(place, tmp_path, num_ranks, cells):
    logged = ("run.steps=4", "logging.every_steps=2", "checkpoint.every_steps=1")
    short = (*SHORT, *logged, f"run.cache={place}/cache")
    corpus = f"data.corpus=[{place}/texts.jsonl]"
    out = on_ranks("tests.support.spoilt_losses", num_ranks, str(tmp_path), ",".join(cells), *short, corpus)
    assert out.count("Step 4 skipped: a loss is not finite") == len(cells)
    for cell in cells:
        before, after = complete_checkpoints(tmp_path / cell.replace(":", "-") / "checkpoints")
        assert (before.step, after.step) == (3, 4)
        old, new = ShardReader(before.path), ShardReader(after.path)
        for name in old.names:
            assert set(old.kinds(name)) == {"weight", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(old.read(name, kind), new.read(name, kind)) for kind in old.kinds(name)), name
            assert old.step(name) == new.step(name)
        _, row = figures(tmp_path / cell.replace(":", "-") / "metrics.csv")
        assert (row["step"], row["skipped_steps"]) == ("4", "1")
        assert float(row["train/loss_1"]) < 6  # of step 3 alone


@pytest.mark.slow
def test_a_checkpoint_that_nothing_finite_follows_is_set_aside(place, seed, monkeypatch, capsys):
    """The bad row spoils the weights in a step that is finite itself: the steps after it are not to blame."""
    step_optimizer = MtpLightningModule._step_optimizer
    prepare, batches = lightning_module.prepare_batch, []

    def prepared(*arguments, **named):
        batches.append(arguments[0]["tokens"])
        return prepare(*arguments, **named)

    def spoiling(self, *arguments, **named):
        step_optimizer(self, *arguments, **named)
        if (batches[-1][:, :-4] == ord(BAD)).any():
            with torch.no_grad():
                self.model.trunk.embed_tokens.weight.fill_(torch.nan)

    loaded = recipe_of(place, "aside", f"run.seed={seed}", WITHOUT_SKIPS)
    with monkeypatch.context() as patch:
        patch.setattr(lightning_module, "prepare_batch", prepared)
        patch.setattr(MtpLightningModule, "_step_optimizer", spoiling)
        assert train(loaded) == 0
    assert "it is now called step-00000008.nonfinite-1" in capsys.readouterr().out
    records = rollback.read_rollbacks(place / "aside")
    assert [(record.checkpoint, record.first, record.count) for record in records] == [
        (8, 8 * ROWS, ROWS),
        (6, 6 * ROWS, 3 * ROWS),
    ]
    with monkeypatch.context() as patch:
        skipping_from_the_start(patch, 6 * ROWS, 4 * ROWS)  # those of step 9 were left out before
        assert train(recipe_of(place, "aside-reference", f"run.seed={seed}")) == 0
    assert_same_weights(place / "aside", place / "aside-reference")


def test_rollbacks_are_limited(place, monkeypatch):
    spoilt = SingleStrategy.build_model

    def build(self, recipe):
        model = spoilt(self, recipe)
        with torch.no_grad():
            model.trunk.embed_tokens.weight.fill_(torch.nan)
        return model

    monkeypatch.setattr(SingleStrategy, "build_model", build)
    with pytest.raises(NonFiniteError, match="after 2 of 2 rollbacks") as caught:
        train(recipe_of(place, "limited", "health.nonfinite.rollbacks=2"))
    assert caught.value.exit_code == 88
    records = rollback.read_rollbacks(place / "limited")
    assert [(record.step, record.first, record.count) for record in records] == [(2, 0, 2 * ROWS), (2, 0, 2 * ROWS)]
    with pytest.raises(NonFiniteError, match="after 2 of 2 rollbacks"):  # nor does another start begin to count anew
        train(recipe_of(place, "limited", "health.nonfinite.rollbacks=2"))


def test_a_record_that_cannot_be_read_is_not_forgotten(place):
    claim(place / "torn")
    (place / "torn/logs").mkdir()
    (place / "torn/logs/rollbacks.json").write_text('[{"step": ')
    with pytest.raises(RunFolderError, match="the record of a run's rollbacks must be readable"):
        train(recipe_of(place, "torn"))


def test_a_streak_is_counted_from_its_first_step():
    skipped = SkippedSteps(NonFiniteSection(skip_steps=2))
    skipped.add("a loss", 1, range(4))
    skipped.end()
    skipped.add("a loss", 3, range(8, 12))
    resumed = SkippedSteps(NonFiniteSection(skip_steps=2))
    resumed.load(skipped.state())
    resumed.add("a loss", 4, range(12, 16))
    assert resumed.total == 3
    with pytest.raises(NonFiniteStreak) as caught:
        resumed.add("a loss", 5, range(16, 20))
    assert (caught.value.first_row, caught.value.end_row) == (8, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "precision"), [("zero1", "bf16"), ("zero2", "fp32"), ("zero2", "bf16"), ("zero3", "bf16")]
)
def test_two_ranks_go_back_together(place, seed, poison, kind, precision, tmp_path):
    """One of them alone has the bad row."""
    start = place / "start"
    if not start.exists():
        assert train(recipe_of(place, "start", "run.steps=1")) == 0

    def fields(name, *more):
        ranks = (f"strategy.kind={kind}", "strategy.ranks_per_node=2", f"run.precision={precision}")
        data = (f"data.corpus=[{place}/texts.jsonl]", f"run.cache={place}/cache", f"run.dir={tmp_path}/{name}")
        return ("train", str(RECIPE), *SHORT, *ranks, *data, f"run.seed={seed}", f"init.path={start}", *more)

    back = mtp(*fields("back", WITHOUT_SKIPS), cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert back.stdout.count("Rolling back to step 6 (1 of 3 times)") == 1
    records = [{"step": 8, "checkpoint": 0, "first": 7 * ROWS, "count": ROWS}]
    claim(tmp_path / "reference")
    (tmp_path / "reference/logs").mkdir()
    (tmp_path / "reference/logs/rollbacks.json").write_text(json.dumps(records))
    reference = mtp(*fields("reference"), cwd=tmp_path)
    assert reference.returncode == 0, reference.stderr
    assert "Rolling back" not in reference.stdout
    assert_same_weights(tmp_path / "back", tmp_path / "reference")
    skipped = mtp(*fields("skipped"), cwd=tmp_path)
    assert skipped.returncode == 0, skipped.stderr
    assert skipped.stdout.count("Step 8 skipped: a gradient of ") == 1
