"""Law: every schedule is that of torch or transformers, a pure function of the step."""

import math

import pytest
import torch
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.errors import RecipeError
from mtp_lightning.recipe import load_recipe, recipe_to_yaml
from mtp_lightning.recipe.learning_rate import learning_rate
from mtp_lightning.recipe.schema.root import OptimizerSection

STEPS = 40
WARMUP = 6


def rates(num_steps=STEPS, **fields):
    section = OptimizerSection(lr=0.02, **fields)
    return [learning_rate(section, step, num_steps) for step in range(num_steps)]


def rates_of(build, *args, **options):
    """Rates that a scheduler of transformers sets after each step: its steps are counted from 1 here."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = build(optimizer, *args, **options)
    found = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def decay(shape, warmup, steps=8, least=0.0):
    return {
        "num_warmup_steps": warmup,
        "num_decay_steps": steps,
        "num_stable_steps": STEPS - steps - warmup,
        "decay_type": shape,
        "min_lr_ratio": least,
    }


SHAPES = ("1-sqrt", "linear", "cosine")


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize(
    ("fields", "name", "options"),
    [
        ({"schedule": "cosine"}, "get_cosine_schedule_with_warmup", {"num_training_steps": STEPS}),
        (
            {"schedule": "cosine", "min_lr_ratio": 0.3},
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": STEPS, "min_lr_rate": 0.3},
        ),
        ({"schedule": "linear"}, "get_linear_schedule_with_warmup", {"num_training_steps": STEPS}),
        (
            {"schedule": "linear", "min_lr_ratio": 0.25},
            "get_polynomial_decay_schedule_with_warmup",
            {"num_training_steps": STEPS, "lr_end": 0.005},
        ),
        ({"schedule": "constant"}, "get_constant_schedule_with_warmup", {}),
        ({"schedule": "inverse_sqrt"}, "get_inverse_sqrt_schedule", {}),
        *(({"schedule": "wsd", "decay_shape": shape}, "get_wsd_schedule", shape) for shape in SHAPES),
        (  # the least rate is also where their warm-up starts
            {"schedule": "wsd", "decay_fraction": 0.5, "min_lr_ratio": 0.2, "warmup_from": 0.2},
            "get_wsd_schedule",
            (20, 0.2),
        ),
    ],
)
def test_every_schedule_is_that_of_transformers(fields, name, options, warmup):
    optimization = pytest.importorskip(
        "transformers.optimization", reason="needs transformers: pip install 'mtp_lightning[transformers]'"
    )
    if isinstance(options, str):
        options = decay(options, warmup)
    elif isinstance(options, tuple):
        options = decay("1-sqrt", warmup, *options)
    expected = rates_of(getattr(optimization, name), **{"num_warmup_steps": warmup, **options})
    assert rates(warmup_steps=warmup, **{"min_lr_ratio": 0.0, **fields}) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) > (1 if warmup > 1 or fields["schedule"] != "constant" else 0)


def test_a_warm_up_from_a_share_of_the_peak_is_torchs_linear_rate():
    def build(optimizer):
        return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=WARMUP)

    found = rates(schedule="constant", warmup_steps=WARMUP, warmup_from=0.25)
    assert found == pytest.approx(rates_of(build), rel=1e-12)
    assert found[0] == pytest.approx(0.02 * (0.25 + 0.75 / WARMUP))


def test_a_second_warm_up_multiplies_the_schedule_and_changes_nothing_before_it():
    once = rates(schedule="wsd", warmup_steps=4)
    twice = rates(schedule="wsd", warmup_steps=4, rewarm_at=20, warmup_from=0.1)
    factors = [0.1 + 0.9 * done / 4 for done in (1, 2, 3, 4)]
    assert twice[4:20] == once[4:20]
    assert twice[20:24] == pytest.approx([rate * factor for rate, factor in zip(once[20:24], factors, strict=True)])
    assert twice[24:] == once[24:]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
def test_no_length_of_run_leads_out_of_bounds(schedule, num_steps, warmup):
    """A run that is shorter than its warm-up ends within it."""
    found = rates(num_steps, schedule=schedule, warmup_steps=warmup)
    assert all(0 < rate <= 0.02 and math.isfinite(rate) for rate in found)
    if warmup >= num_steps:
        assert found == pytest.approx([0.02 * (step + 1) / warmup for step in range(num_steps)])


LONG = "run: {steps: 200}\noptimizer: {warmup_steps: 150}\n"
"""A recipe of 200 steps; a trial of it may be as short as it likes."""


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (LONG, ()),
        (LONG, ("run.steps=20",)),
        (LONG + "phases: {a: {run: {steps: 180}}}\n", ("phases.a.run.steps=20",)),
        ("name: of defaults\n", ("run.steps=20",)),
        ("run: {steps: 20}\n", ()),
        (LONG, ("optimizer.schedule=wsd", "optimizer.decay_fraction=0.25")),
    ],
)
def test_what_is_short_on_purpose_is_healthy_and_so_is_its_resolved_recipe(tmp_path, text, overrides):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    recipe = load_recipe(path, overrides).recipe
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(path).recipe == recipe


def test_a_phase_keeps_the_state_of_its_own_optimizer_only(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("phases: {a: {}, b: {keep_optimizer: true, optimizer: {kind: muon}}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert [fault.found for fault in caught.value.faults] == ["adamw in a, muon in b"]


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (LONG, ("optimizer.schedule=wsd", "optimizer.decay_fraction=0.3")),
        (LONG, ("optimizer.schedule=wsd", "optimizer.warmup_steps=195")),
    ],
)
def test_parts_of_wsd_that_do_not_fit_are_a_fault(tmp_path, text, overrides):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert [fault.path.rpartition(".")[2] for fault in caught.value.faults] == ["warmup_steps"]


def test_the_rate_of_every_phase_is_drawn(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "phases:\n  one: {optimizer: {schedule: wsd}}\n  two: {optimizer: {lr: 0.25, lr_scale: {heads: 4}}}\n"
    )
    lines = CliRunner().invoke(app, ["recipe", "show", str(path), "--plot-lr"]).output.splitlines()
    assert [line for line in lines if "peak" in line] == [
        "1-one: wsd, peak 0.001, last 0.0001",
        "2-two: cosine, peak 0.25, last 0.025",
    ]
    assert sum("█" in line for line in lines) == 20
    assert lines[-1] == "optimizer.lr_scale: heads x 4"
    assert max(map(len, lines)) <= 80
