"""Memory does not grow with n, and no backward order but joint ever holds a (T, V) tensor.

Counted on tensors without data at the full shape, which takes seconds, and measured for real in processes of their
own, as `mtp bench memory` does. The two agree, which is what makes resident memory a measure of tensors.
"""

import functools

import pytest

from mtp_lightning.bench.training.memory import run_probe
from mtp_lightning.planner.layout import with_backward_order, with_offsets
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.covering import every_pair
from tests.support.live_tensors import count_schedule

KINDS = {
    "parallel": {"kind": "parallel"},
    "linear": {"kind": "linear"},
    "causal": {"kind": "chained"},
    "anticausal": {"kind": "chained", "order": "anticausal"},
    "sequential": {"kind": "sequential"},
    "recursive": {"kind": "recursive"},
    "medusa": {"kind": "medusa"},
}
COUNTED = pytest.mark.xdist_group("counted peaks")  # one worker, which counts each once
MEASURED = pytest.mark.xdist_group("measured peaks")
_SLOW = (pytest.mark.slow, COUNTED)
SOME_KINDS = [kind if kind in ("parallel", "sequential") else pytest.param(kind, marks=_SLOW) for kind in KINDS]
CHAINED = ("causal", "anticausal", "sequential", "recursive")
OBJECTIVES = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1, "z_loss": 1e-4},
    "balanced": {"balance": "rms"},
    "ordered": {"token_order": {"window_size": 64}},
    "recomputed": {"memory": {"recompute_trunk": True, "recompute_heads": True}},
}
MOST_GROWTH = 1.15
WORKSPACE_BYTES = 12 * 2**20  # what libraries may take beside the tensors, or have taken before


def full_recipe(heads, objective=None, precision="fp32"):
    """The shape that the claim is made for."""
    objective = dict(objective or {})
    return Recipe.model_validate(
        {
            "model": {"hidden_size": 256, "num_hidden_layers": 10, "vocab_size": 32_000},
            "heads": heads | {"num_offsets": 8},
            "memory": objective.pop("memory", {}),
            "objective": objective,
            "data": {"seq_len": 2048},
            "batch": {"global_batch_size": 1, "micro_batch_size": 1},
            "run": {"precision": precision, "threads": 1, "device": "cpu"},
        }
    )


def small_recipe(heads=None):
    """A shape that is measured in seconds and shows the same."""
    return Recipe.model_validate(
        {
            "model": {"hidden_size": 64, "num_hidden_layers": 10, "num_attention_heads": 4, "vocab_size": 8000},
            "heads": (heads or {}) | {"num_offsets": 8},
            "objective": {"chunk_mib": 4.0},
            "data": {"seq_len": 1024},
            "batch": {"global_batch_size": 1, "micro_batch_size": 1},
            "run": {"threads": 1, "device": "cpu"},
        }
    )


@functools.cache
def counted(kind, backward_order, num_offsets=8):
    """Numel of the largest tensor and bytes at the peak; counted once for all tests."""
    recipe = with_backward_order(with_offsets(full_recipe(KINDS[kind]), num_offsets), backward_order)
    live, state_bytes = count_schedule(recipe)
    return live.largest_numel, live.peak_bytes + state_bytes


def counted_peak(recipe):
    live, state_bytes = count_schedule(recipe)
    return live.peak_bytes + state_bytes


def measured_peak(recipe):
    return _measured(recipe.model_dump_json())


@functools.cache
def _measured(text):
    """Several tests compare with one another what takes half a minute to measure."""
    result = run_probe(Recipe.model_validate_json(text))
    assert "failure" not in result, result
    return result["peak_bytes"]


def allowed_growth(kind, recipe):
    """Chained kinds may add the hidden states of their offsets."""
    hidden_bytes = 4 * recipe.data.seq_len * recipe.model.hidden_size
    return recipe.heads.num_offsets * hidden_bytes if kind in CHAINED else 0


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_only_joint_holds_positions_by_vocabulary(kind):
    recipe = full_recipe(KINDS[kind])
    positions_by_vocabulary = recipe.data.seq_len * recipe.model.vocab_size
    assert counted(kind, "joint")[0] == positions_by_vocabulary
    assert max(counted(kind, "sequential")[0], counted(kind, "bridged")[0]) <= positions_by_vocabulary / 4


@every_pair(objective=OBJECTIVES, precision=["fp32", "bf16"], backward_order=["sequential", "bridged"], full=True)
def test_no_objective_holds_positions_by_vocabulary(objective, precision, backward_order):
    recipe = with_offsets(full_recipe({}, OBJECTIVES[objective], precision), 4)  # any number of offsets shows it
    recipe = with_backward_order(recipe, backward_order)
    largest = count_schedule(recipe)[0].largest_numel
    assert largest <= recipe.data.seq_len * recipe.model.vocab_size / 4


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_counted_peak_does_not_grow_with_offsets(kind):
    assert counted(kind, "sequential")[1] <= MOST_GROWTH * counted(kind, "sequential", 1)[1]


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_counted_peak_stays_far_below_joint(kind):
    assert counted(kind, "sequential")[1] < counted(kind, "joint")[1] / 3


@pytest.mark.slow
def test_measured_peak_does_not_grow():
    recipe = small_recipe()
    one = measured_peak(with_offsets(recipe, 1))
    sequential = measured_peak(recipe)
    joint = measured_peak(with_backward_order(recipe, "joint"))
    assert sequential <= MOST_GROWTH * one
    assert sequential < joint / 3
    assert sequential == pytest.approx(counted_peak(recipe), abs=WORKSPACE_BYTES)
    assert joint == pytest.approx(counted_peak(with_backward_order(recipe, "joint")), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "parallel"])
def test_measured_peak_is_the_counted_one_for_every_kind(kind):
    recipe = small_recipe(KINDS[kind])
    assert measured_peak(recipe) == pytest.approx(counted_peak(recipe), abs=WORKSPACE_BYTES)


@MEASURED
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=(pytest.mark.matrix, pytest.mark.slow)[kind == "parallel"]) for kind in KINDS]
)
def test_measured_peak_at_the_full_shape(kind):
    recipe = full_recipe(KINDS[kind])
    one, eight = measured_peak(with_offsets(recipe, 1)), measured_peak(recipe)
    assert eight <= MOST_GROWTH * one + allowed_growth(kind, recipe)
    assert eight == pytest.approx(counted_peak(recipe), rel=0.05)


@MEASURED
@pytest.mark.slow
def test_measured_peak_stays_far_below_joint_at_the_full_shape():
    recipe = full_recipe({})
    assert measured_peak(recipe) < measured_peak(with_backward_order(recipe, "joint")) / 3
