"""What is frozen costs what torch says: operations of a real step of every kind of adaptation."""

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtp_lightning.bench.training.step import TrainingStep
from mtp_lightning.planner.flops import attention_flops_per_position, flops_per_position
from mtp_lightning.planner.passes import passes_of
from mtp_lightning.planner.variants import obstacle
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.tiny import HEAD_KINDS, NEOX, tiny_recipe

EVERY_TARGET = ["q", "k", "v", "o", "gate", "up", "down"]
ADAPTATIONS: dict[str, dict[str, Any]] = {
    "nothing frozen": {},
    "trunk": {"freeze": ["trunk"]},
    "trunk and unembedding": {"freeze": ["trunk", "unembedding"]},
    "unembedding": {"freeze": ["unembedding"]},
    "heads": {"freeze": ["heads"]},
    "heads and unembedding": {"freeze": ["heads", "unembedding"]},
    "all but the unembedding": {"freeze": ["trunk", "heads"]},
    "from 2": {"freeze": ["offsets_below_2"]},
    "from 3": {"freeze": ["offsets_below_3"]},
    "updates": {"adapt": {"lora": {"rank": 3}}},
    "updates of k beside frozen matrices": {
        "adapt": {"lora": {"rank": 3, "targets": ["k"]}},
        "freeze": ["unembedding", "heads"],
    },
    "updates of the last": {"adapt": {"lora": {"rank": 3, "targets": ["down"]}}, "freeze": ["unembedding"]},
    "updates under frozen heads": {"adapt": {"lora": {"rank": 3}}, "freeze": ["offsets_below_3"]},
    "updates everywhere": {"adapt": {"lora": {"targets": EVERY_TARGET, "in_heads": True}}, "freeze": ["heads"]},
    "updates as they are": {"adapt": {"lora": {"rank": 3}}, "freeze": ["lora"]},
    "mixtures": {"adapt": {"layer_mix": {}}, "freeze": ["trunk", "unembedding", "heads"]},
    "isolated trunk": {"heads": {"detach_trunk": True}},
    "isolated trunk, frozen heads": {"heads": {"detach_trunk": True}, "freeze": ["heads"]},
}
KINDS = [kind for kind in HEAD_KINDS if kind not in ("parallel_two_layers", "parallel_replicated")]  # as others
MODELS = {"llama": {}, "neox": NEOX, "tied": {"tie_word_embeddings": True}}
Shape = torch.Size


def recipe_of(kind: str, adaptation: str, model: str = "llama", **objective: object) -> Recipe | None:
    """Build a tiny recipe in which nothing is computed twice; None where the rules refuse it, or nothing is trained."""
    sections = ADAPTATIONS[adaptation]
    recipe = tiny_recipe(
        model=MODELS[model] | {"num_hidden_layers": 7},
        heads=HEAD_KINDS[kind] | sections.get("heads", {}),
        adapt=sections.get("adapt", {}),
        freeze=sections.get("freeze", []),
        memory={"recompute_heads": False},
        objective=objective,
    )
    return recipe if obstacle(recipe) is None else None


def in_place(into: Shape, left: Shape, right: Shape, **_: object) -> int:
    """Count `addmm_`, which torch 2.13 leaves out."""
    return 2 * left[0] * left[1] * right[1]


def attention(query: Shape, key: Shape, *_: object, **__: object) -> int:
    """Count the CPU's fused attention, which torch 2.13 leaves out: two products."""
    return 4 * math.prod(query) * key[2]


def attention_back(_: Shape, query: Shape, key: Shape, *__: object, **___: object) -> int:
    """Count the four products of its backward pass, and not the scores that it computes again."""
    return 8 * math.prod(query) * key[2]


def counted(recipe: Recipe, schedule: str) -> dict[str, int]:
    """Let torch count the operations of a real step."""
    aten = torch.ops.aten
    left_out = {
        aten.addmm_: in_place,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back,
    }
    step = TrainingStep(recipe, torch.device("cpu"))
    with FlopCounterMode(display=False, custom_mapping=left_out) as counter:
        step.run(schedule, predicts=False)
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def assert_counts(recipe: Recipe | None, schedule: str, more_logits: int = 0) -> None:
    """Compare a step with the planner's count."""
    if recipe is None:
        return
    positions = recipe.batch.global_batch_size * recipe.data.seq_len
    extra = 2 * more_logits * recipe.model.vocab_size * recipe.model.hidden_size
    by_kind = counted(recipe, schedule)
    assert sum(by_kind.values()) == positions * (flops_per_position(recipe) + extra)
    between = sum(flops for op, flops in by_kind.items() if "attention" in op)
    assert between == positions * attention_flops_per_position(recipe) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_operations_are_those_that_torch_counts(kind: str, adaptation: str) -> None:
    assert_counts(recipe_of(kind, adaptation), "sequential")


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_operations_of_other_models(adaptation: str) -> None:
    if adaptation != "updates everywhere":
        assert_counts(recipe_of("sequential", adaptation, "neox"), "sequential")
    assert_counts(recipe_of("parallel", adaptation, "tied"), "sequential")


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_bridged_costs_as_much_as_sequential(adaptation: str) -> None:
    assert_counts(recipe_of("sequential", adaptation), "bridged")


@pytest.mark.parametrize(
    ("kind", "adaptation", "more_logits"),
    [("parallel", "nothing frozen", 0), ("linear", "trunk", 0), ("medusa", "updates", 0), ("sequential", "from 3", 2)],
)
def test_joint_computes_logits_that_teach_nothing_too(kind: str, adaptation: str, more_logits: int) -> None:
    assert_counts(recipe_of(kind, adaptation), "joint", more_logits)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_token_order_is_a_product_more(adaptation: str) -> None:
    assert_counts(recipe_of("parallel", adaptation, token_order={"window_size": 4}), "sequential")


@pytest.mark.parametrize("schedule", ["sequential", "bridged"])
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("detach", [True, False])
def test_scores_of_the_teacher_are_planned(adaptation: str, schedule: str, detach: bool) -> None:
    assert_teacher_counts("sequential", adaptation, schedule, detach=detach)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adaptation", ["nothing frozen", "trunk", "updates"])
@pytest.mark.parametrize(("schedule", "detach"), [("sequential", True), ("bridged", True), ("bridged", False)])
def test_scores_of_the_teacher_of_every_kind_are_planned(
    kind: str, adaptation: str, schedule: str, detach: bool
) -> None:
    """The sequential schedule runs a main head with layers of its own once more for a teacher that learns."""
    assert_teacher_counts(kind, adaptation, schedule, detach=detach)


def assert_teacher_counts(kind: str, adaptation: str, schedule: str, *, detach: bool) -> None:
    """Compare a distilled step with the planner's count and what it says is computed again."""
    distill = {"beta": [0.5, 0.0, 0.5], "top_k": 7, "detach_teacher": detach}
    recipe = recipe_of(kind, adaptation, distill=distill)
    if recipe is None:
        return
    window = recipe.data.seq_len
    passes, micro_positions = passes_of(recipe), recipe.batch.micro_batch_size * window
    planned = recipe.batch.global_batch_size * window * (flops_per_position(recipe) + 2 * passes.teacher.entries)
    if passes.num_compared:  # the last k-1 rows of a micro-batch have no row of the teacher
        compared = [offset for offset in (2, 4) if offset >= 5 - 2 * passes.num_compared + (passes.num_compared - 1)]
        assert len(compared) == passes.num_compared
        rows = recipe.batch.global_batch_size // recipe.batch.micro_batch_size * sum(offset - 1 for offset in compared)
        planned -= 2 * rows * passes.teacher.entries // passes.num_compared
    assert micro_positions > 3
    assert sum(counted(recipe, schedule).values()) == planned


def test_a_frozen_main_head_is_run_where_others_are_compared_with_it() -> None:
    alone, compared = (recipe_of("parallel", "from 3", **more) for more in ({}, {"distill": {}}))
    assert alone is not None
    assert compared is not None
    between = sum(flops for op, flops in counted(compared, "sequential").items() if "attention" in op)
    positions = compared.batch.global_batch_size * compared.data.seq_len
    assert between == positions * attention_flops_per_position(compared)
    assert attention_flops_per_position(compared) > attention_flops_per_position(alone)
