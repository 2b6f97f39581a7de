"""The guard of the main head: its figures against the definitions, and what it stops."""

import math

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.loading.dataset import tensors_of
from mtp_lightning.errors import TrainingError
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from mtp_lightning.training.health.drift import HeldOut, drift_of, drift_section, drift_sums, record
from tests.support.runs import ROOT, figures, mtp
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe, tiny_rows

COLUMNS = [f"drift/{name}" for name in ("nll_change", "nll_change_low", "nll_change_high", "kl", "flips")]
HARM = (
    "objective.distill={beta: [5], detach_teacher: false}",
    "optimizer.lr=3e-2",
    "optimizer.warmup_steps=0",
    "run.steps=30",
    "logging.every_steps=2",
    "checkpoint.every_steps=2",
)


def models(vocab_size=13, kind="sequential"):
    heads = HEAD_KINDS[kind]
    recipe = tiny_recipe(
        heads=heads, model={"vocab_size": vocab_size}, objective={"chunk_mib": 0.002}, data={"document_mask": True}
    )
    before, after = tiny_model(recipe), tiny_model(recipe)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
    return recipe, before, after


def batches(recipe):
    return [HeldOut(*tiny_rows(recipe, rows, seed)) for rows, seed in ((2, 0), (3, 1), (1, 2))]


def measured(after, rows_of, references):
    return drift_of(sum(drift_sums(after, *pair) for pair in zip(rows_of, references, strict=True)), Ranks())


@pytest.mark.parametrize("kind", ["sequential", "anticausal", "parallel"])
def test_figures_are_the_definitions(kind):
    recipe, before, after = models(kind=kind)
    rows_of = batches(recipe)
    drift = measured(after, rows_of, [record(before, rows) for rows in rows_of])
    changes, kl, flips = [], [], []
    for rows in rows_of:
        targets = shifted_targets(rows.tokens, rows.documents, 4, rows.loss_mask)[0]
        p, q = (
            model.unembedding.logits(1, model.hidden_states(rows.tokens, rows.documents)[1]).log_softmax(-1).detach()
            for model in (before, after)
        )
        for row, wanted in enumerate(targets):
            valid = [t for t in range(len(wanted)) if wanted[t] != IGNORE]
            changes.append(sum(float(p[row, t, wanted[t]] - q[row, t, wanted[t]]) for t in valid) / len(valid))
            kl += [float((p[row, t].exp() * (p[row, t] - q[row, t])).sum()) for t in valid]
            flips += [float(p[row, t].argmax() != q[row, t].argmax()) for t in valid]
    mean = sum(changes) / len(changes)
    margin = 1.96 * math.sqrt(sum((c - mean) ** 2 for c in changes) / (len(changes) - 1) / len(changes))
    assert drift.loss_change == pytest.approx(mean, rel=1e-5)
    assert (drift.low, drift.high) == pytest.approx((mean - margin, mean + margin), rel=1e-5)
    assert drift.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert drift.flips == pytest.approx(sum(flips) / len(flips))
    assert 0 < drift.flips < 1


def test_kept_tokens_give_a_lower_bound_of_kl_that_is_near():
    recipe, before, after = models(vocab_size=500)
    rows = batches(recipe)[1]
    found = drift_of(drift_sums(after, rows, record(before, rows)), Ranks()).kl
    p, q = (
        model.unembedding.logits(1, model.hidden_states(rows.tokens, rows.documents)[1]).log_softmax(-1).detach()
        for model in (before, after)
    )
    valid = shifted_targets(rows.tokens, rows.documents, 4, rows.loss_mask)[0] != IGNORE
    exact = float((p.exp() * (p - q)).sum(-1)[valid].mean())
    assert 0.5 * exact < found <= exact


def test_a_model_has_not_drifted_from_itself():
    recipe, before, _ = models()
    rows_of = batches(recipe)
    drift = measured(before, rows_of, [record(before, rows) for rows in rows_of])
    assert (drift.loss_change, drift.low, drift.high, drift.flips) == (0, 0, 0, 0)
    assert drift.kl == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def run(folder, name, *overrides):
    own = ("run.threads=1", f"run.dir={folder / name}", f"run.cache={folder / 'cache'}", "run.steps=40")
    return train(load_recipe(ROOT / "recipes/debug/sequential.yaml", [*own, "optimizer.lr=4e-3", *overrides]))


@pytest.fixture(scope="module")
def start(folder):
    run(folder, "start", "run.steps=100", "checkpoint.every_steps=100", "run.validate_every_steps=100")
    return f"init.path={folder / 'start'}"


def guard_rows(folder, name):
    rows = [row for row in figures(folder / name / "metrics.csv") if row["drift/nll_change"]]
    return {int(row["step"]): {column: float(row[column]) for column in COLUMNS} for row in rows}


@pytest.mark.parametrize(
    ("fields", "is_guarded"),
    [
        ({}, False),
        ({"init": {"path": "runs/a"}}, True),
        ({"init": {"path": "runs/a", "optimizer": True}}, False),
        ({"init": {"path": "runs/a"}, "health": {"drift": None}}, False),
    ],
)
def test_who_is_guarded_by_default(fields, is_guarded):
    assert (drift_section(tiny_recipe(**fields)) is not None) is is_guarded


@pytest.mark.parametrize(
    ("kind", "frozen", "is_guarded"),
    [
        ("parallel", ["unembedding"], True),
        ("parallel", ["trunk", "unembedding"], True),
        ("parallel", ["trunk", "unembedding", "heads"], False),
        ("medusa", ["unembedding"], True),
        ("medusa", ["trunk", "unembedding"], False),
        ("sequential", ["trunk", "unembedding"], False),
    ],
)
def test_a_main_head_that_nothing_can_change_needs_no_guard(kind, frozen, is_guarded):
    adapted = tiny_recipe(heads=HEAD_KINDS[kind], freeze=frozen, init={"path": "runs/a"})
    assert (drift_section(adapted) is not None) is is_guarded


def test_the_guard_by_default_is_the_one_that_is_written_out(folder, start):
    short = [start, "run.steps=4", "logging.every_steps=2"]
    run(folder, "unsaid", *short)
    run(folder, "said", *short, "health.drift={stop_loss: 0.5}")
    assert guard_rows(folder, "unsaid") == guard_rows(folder, "said") != {}


def test_a_harmful_recipe_is_stopped_before_its_harm_is_saved(folder, start):
    with pytest.raises(TrainingError, match=r"health.drift.stop_loss crossed at step") as caught:
        run(folder, "harm", start, "health.drift={every_steps: 4, samples: 16, stop_loss: 0.1}", *HARM)
    assert "objective.distill.beta" in caught.value.hint
    rows = guard_rows(folder, "harm")
    stopped = max(rows)
    assert rows[stopped]["drift/nll_change_low"] > 0.1
    assert all(figures["drift/nll_change_low"] <= 0.1 for step, figures in rows.items() if step < stopped)
    saved = [int(path.name.removeprefix("step-")) for path in (folder / "harm/checkpoints").glob("step-*")]
    assert max(saved, default=0) < stopped < 30


@pytest.mark.slow
def test_without_a_guard_the_same_recipe_goes_on(folder, start):
    assert run(folder, "unguarded", start, *HARM) == 0


@pytest.mark.parametrize("limit", ["stop_kl", pytest.param("stop_flips", marks=pytest.mark.slow)])
def test_other_limits_stop_it_too(folder, start, limit):
    guard = f"health.drift={{every_steps: 2, samples: 16, stop_loss: null, {limit}: 0.2}}"
    with pytest.raises(TrainingError, match=f"health.drift.{limit} crossed"):
        run(folder, limit, start, guard, *HARM)


def test_a_warning_is_printed_and_nothing_stops(folder, start, capsys):
    guard = "health.drift={every_steps: 5, samples: 16, warn_kl: 0.0001, stop_loss: null}"
    assert run(folder, "warned", start, guard, "run.steps=10", "optimizer.lr=1e-3") == 0
    assert "Guard at step 5: the main head's loss has changed by" in capsys.readouterr().out
    assert sorted(guard_rows(folder, "warned")) == [5, 10]


def test_a_frozen_main_head_does_not_drift(folder, start):
    guard = "health.drift={every_steps: 4, samples: 16, warn_loss: 1e-9, stop_loss: 1e-9, stop_flips: 1e-9}"
    assert run(folder, "frozen", start, guard, "run.steps=8", "freeze=[offsets_below_2]") == 0
    assert guard_rows(folder, "frozen")[8]["drift/nll_change"] == 0


def test_a_resumed_run_is_compared_with_the_model_it_began_as(folder, start):
    fields = (start, "health.drift={every_steps: 5, samples: 16, stop_loss: null}", "checkpoint.every_steps=5")
    assert run(folder, "twice", *fields, "run.steps=10") == 0
    assert run(folder, "twice", *fields, "run.steps=15") == 0
    (recipe, after), (_, before) = load_model(folder / "twice"), load_model(folder / "start")
    held_out = MtpDataModule(recipe).validation_samples
    batches = [tensors_of(held_out.read(held_out.spread(16)))]
    rows_of = [HeldOut(batch["tokens"], batch["documents"], None) for batch in batches]
    expected = measured(after, rows_of, [record(before, rows) for rows in rows_of]).figures
    found = guard_rows(folder, "twice")
    assert sorted(found) == [5, 10, 15]
    assert found[15] == pytest.approx(expected, rel=1e-4)
    assert found[15]["drift/kl"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_two_ranks_see_the_drift_that_one_sees_and_stop_together(folder, start, kind):
    fields = (start, "health.drift={every_steps: 4, samples: 16, stop_loss: 0.1}", *HARM)
    with pytest.raises(TrainingError):
        run(folder, f"single-{kind}", *fields)
    ranks = (f"strategy.kind={kind}", "strategy.ranks_per_node=2", f"run.dir={folder / kind}")
    own = ("run.steps=40", "optimizer.lr=4e-3", "run.threads=1", f"run.cache={folder / 'cache'}")
    done = mtp("train", str(ROOT / "recipes/debug/sequential.yaml"), *own, *fields, *ranks, cwd=folder)
    assert done.returncode == TrainingError.exit_code
    assert "health.drift.stop_loss crossed at step" in done.stderr
    one, two = guard_rows(folder, f"single-{kind}"), guard_rows(folder, kind)
    assert one.keys() == two.keys()
    first = min(one)
    assert two[first] == pytest.approx(one[first], rel=1e-2)  # later ones drift apart: the recipe is harmful
