"""What is frozen costs what torch says: operations of a real step of every kind of adaptation."""

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtp_lightning.bench.training.step import TrainingStep
from mtp_lightning.planner.flops import attention_flops_per_position, flops_per_position
from mtp_lightning.planner.layout import obstacle
from mtp_lightning.planner.passes import backward_flow_of
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.covering import every_pair, full_product
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


def recipe_of(kind: str, adaptation: str, model: str = "llama", **objective: object) -> Recipe:
    """Build a tiny recipe in which nothing is computed twice and that keeps all rules."""
    recipe = any_recipe(kind, adaptation, model, **objective)
    assert obstacle(recipe) is None
    return recipe


def any_recipe(kind: str, adaptation: str, model: str, **objective: object) -> Recipe:
    """Build it whether it keeps the rules or not."""
    sections = ADAPTATIONS[adaptation]
    return tiny_recipe(
        model=MODELS[model] | {"num_hidden_layers": 7},
        heads=HEAD_KINDS[kind] | sections.get("heads", {}),
        adapt=sections.get("adapt", {}),
        freeze=sections.get("freeze", []),
        memory={"recompute_heads": False},
        objective=objective,
    )


def exists(*, kind: str, adaptation: str, model: str, orders_tokens: bool = False, **_: object) -> bool:
    """Tell of what the rules let be, without asking them: each line is a rule."""
    sections = ADAPTATIONS[adaptation]
    adapt, heads = sections.get("adapt", {}), sections.get("heads", {})
    below = next((part for part in sections.get("freeze", []) if part.startswith("offsets_below_")), "")
    gate = "gate" in adapt.get("lora", {}).get("targets", [])
    return (
        (model, kind[-10:]) != ("tied", "replicated")
        and not (gate and model == "neox")
        and not (adapt.get("lora", {}).get("in_heads") and kind.startswith(("linear", "medusa")))
        and not ((heads or below) and kind == "anticausal")
        and not (below == "offsets_below_3" and kind == "recursive")
        and not (orders_tokens and below)
    )


def test_the_rules_refuse_what_does_not_exist_and_nothing_else() -> None:
    cells = full_product(kind=KINDS, adaptation=ADAPTATIONS, model=MODELS)
    allowed = [cell for cell in cells if obstacle(any_recipe(*cell)) is None]
    assert allowed == full_product(exists, kind=KINDS, adaptation=ADAPTATIONS, model=MODELS)


def in_place(into: Shape, left: Shape, right: Shape, **_: object) -> int:
    """Count `addmm_`, which torch 2.13 leaves out."""
    return 2 * left[0] * left[1] * right[1]


def attention(query: Shape, key: Shape, *_: object, **__: object) -> int:
    """Count the CPU's fused attention, which torch 2.13 leaves out: two products."""
    return 4 * math.prod(query) * key[2]


def attention_back(_: Shape, query: Shape, key: Shape, *__: object, **___: object) -> int:
    """Count the four products of its backward pass, and not the scores that it computes again."""
    return 8 * math.prod(query) * key[2]


def counted(recipe: Recipe, backward_order: str) -> dict[str, int]:
    """Let torch count the operations of a real step."""
    aten = torch.ops.aten
    left_out = {
        aten.addmm_: in_place,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back,
    }
    step = TrainingStep(recipe, torch.device("cpu"))
    with FlopCounterMode(display=False, custom_mapping=left_out) as counter:
        step.run(backward_order, predicts=False)
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def assert_counts(recipe: Recipe, backward_order: str, more_logits: int = 0) -> None:
    """Compare a step with the planner's count."""
    positions = recipe.batch.global_batch_size * recipe.data.seq_len
    extra = 2 * more_logits * recipe.model.vocab_size * recipe.model.hidden_size
    by_kind = counted(recipe, backward_order)
    assert sum(by_kind.values()) == positions * (flops_per_position(recipe) + extra)
    between = sum(flops for op, flops in by_kind.items() if "attention" in op)
    assert between == positions * attention_flops_per_position(recipe) > 0


@every_pair(
    exists,
    kind=KINDS,
    adaptation=ADAPTATIONS,
    model=MODELS,
    backward_order=["sequential", "bridged"],
    orders_tokens=[False, True],
)
def test_operations_are_those_that_torch_counts(
    kind: str, adaptation: str, model: str, backward_order: str, orders_tokens: bool
) -> None:
    token_order = {"window_size": 4} if orders_tokens else None
    assert_counts(recipe_of(kind, adaptation, model, token_order=token_order), backward_order)


@pytest.mark.parametrize(
    ("kind", "adaptation", "more_logits"),
    [("parallel", "nothing frozen", 0), ("linear", "trunk", 0), ("medusa", "updates", 0), ("sequential", "from 3", 2)],
)
def test_joint_computes_logits_that_teach_nothing_too(kind: str, adaptation: str, more_logits: int) -> None:
    assert_counts(recipe_of(kind, adaptation), "joint", more_logits)


@every_pair(adaptation=ADAPTATIONS, backward_order=["sequential", "bridged"], detach=[True, False], full=True)
def test_scores_of_the_teacher_are_planned(adaptation: str, backward_order: str, detach: bool) -> None:
    assert_teacher_counts("sequential", adaptation, backward_order, detach=detach)


@every_pair(
    kind=KINDS,
    adaptation=["nothing frozen", "trunk", "updates"],
    way=[("sequential", True), ("bridged", True), ("bridged", False)],
    full=True,
)
def test_scores_of_the_teacher_of_every_kind_are_planned(kind: str, adaptation: str, way: tuple[str, bool]) -> None:
    """The sequential backward order runs a main head with layers of its own once more for a teacher that learns."""
    backward_order, detach = way
    assert_teacher_counts(kind, adaptation, backward_order, detach=detach)


def assert_teacher_counts(kind: str, adaptation: str, backward_order: str, *, detach: bool) -> None:
    """Compare a distilled step with the planner's count and what it says is computed again."""
    distill = {"beta": [0.5, 0.0, 0.5], "top_k": 7, "detach_teacher": detach}
    recipe = recipe_of(kind, adaptation, distill=distill)
    window = recipe.data.seq_len
    passes, micro_positions = backward_flow_of(recipe), recipe.batch.micro_batch_size * window
    planned = recipe.batch.global_batch_size * window * (flops_per_position(recipe) + 2 * passes.teacher.entries)
    if passes.num_compared:  # the last k-1 rows of a micro-batch have no row of the teacher
        compared = [offset for offset in (2, 4) if offset >= 5 - 2 * passes.num_compared + (passes.num_compared - 1)]
        assert len(compared) == passes.num_compared
        rows = recipe.batch.global_batch_size // recipe.batch.micro_batch_size * sum(offset - 1 for offset in compared)
        planned -= 2 * rows * passes.teacher.entries // passes.num_compared
    assert micro_positions > 3
    assert sum(counted(recipe, backward_order).values()) == planned


def test_a_frozen_main_head_is_run_where_others_are_compared_with_it() -> None:
    alone, compared = (recipe_of("parallel", "from 3", **more) for more in ({}, {"distill": {}}))
    between = sum(flops for op, flops in counted(compared, "sequential").items() if "attention" in op)
    positions = compared.batch.global_batch_size * compared.data.seq_len
    assert between == positions * attention_flops_per_position(compared)
    assert attention_flops_per_position(compared) > attention_flops_per_position(alone)


@pytest.mark.parametrize("backward_order", ["sequential", "bridged"])
@pytest.mark.parametrize(("kind", "adaptation"), [("parallel", "nothing frozen"), ("medusa", "trunk and unembedding")])
def test_a_draft_vocabulary_is_planned_as_torch_counts_it(kind: str, adaptation: str, backward_order: str) -> None:
    whole = recipe_of(kind, adaptation)
    heads = whole.heads.model_copy(update={"draft_vocabulary": 5})
    recipe = whole.model_copy(update={"heads": heads})
    assert_counts(recipe, backward_order)
    assert flops_per_position(recipe) < flops_per_position(whole)
    assert backward_flow_of(recipe).num_scored == backward_flow_of(whole).num_scored - 3 * (13 - 5)
