"""Bytes on paper, against measured peaks and against what ZeRO promises."""

from dataclasses import replace
from itertools import pairwise

import pytest

from mtp_lightning.planner.layout import Layout, layout_of
from mtp_lightning.planner.memory import BOUNDARY_STATES, GIB, layer_bytes, memory, most_micro_rows
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.recipe.loading.load import load_recipe
from mtp_lightning.recipe.schema.root import Recipe
from tests.structure.source import ROOT

MIB = 2**20
MEASURED_MIB = {(1, "sequential"): 812, (1, "joint"): 1715, (4, "sequential"): 732, (4, "joint"): 2477}
"""`mtp bench memory recipes/debug/memory.yaml --offsets 1,4`, torch 2.13 on a CPU: peak resident memory."""

MEASURED_NEOX_MIB = {"sequential": 684, "joint": 1587}
"""The same of one offset, with `NEOX` on the command line."""
NEOX = [
    "model.norm=layer",
    "model.mlp=gelu",
    "model.parallel_residual=true",
    *(f"model.{name}_bias=true" for name in ("qkv", "output", "mlp")),
]

MEASURED_FROZEN_MIB = {
    ("freeze=[trunk,unembedding]",): 249,
    ("freeze=[trunk]",): 376,
    ("freeze=[unembedding]",): 600,
    ("freeze=[offsets_below_2]",): 240,
    ("adapt.lora={rank: 8}",): 562,
    ("adapt.lora={rank: 8}", "freeze=[heads,unembedding]"): 388,
    ("adapt.layer_mix={}", "freeze=[trunk,unembedding]"): 269,
    ("freeze=[trunk,unembedding]", "objective.backward_order=joint"): 2040,
    ("adapt.lora={rank: 8}", "objective.backward_order=joint"): 2305,
}
"""The same of four offsets, with this on the command line; nothing frozen: 728 and, joint, 2,473."""

PAPER = load_recipe(ROOT / "recipes/paper/6.7b_n4.yaml").recipe
SHAPE, LAYOUT = shape_of(PAPER), layout_of(PAPER)


def on(**changes: object) -> Layout:
    """The 6.7B recipe's step with something changed."""
    return replace(LAYOUT, **changes)


@pytest.mark.parametrize("cell", MEASURED_MIB, ids=lambda cell: f"{cell[1]}-{cell[0]}")
def test_predicted_peak_is_near_the_measured_one(cell: tuple[int, str]) -> None:
    num_offsets, backward_order = cell
    overrides = [f"heads.num_offsets={num_offsets}", f"objective.backward_order={backward_order}"]
    recipe = load_recipe(ROOT / "recipes/debug/memory.yaml", overrides).recipe
    needed = memory(shape_of(recipe), layout_of(recipe))
    assert (needed.total - needed.overhead) / MIB == pytest.approx(MEASURED_MIB[cell], rel=0.15)


@pytest.mark.parametrize("backward_order", MEASURED_NEOX_MIB)
def test_predicted_peak_of_the_neox_type_is_near_the_measured_one(backward_order: str) -> None:
    overrides = ["heads.num_offsets=1", f"objective.backward_order={backward_order}", *NEOX]
    recipe = load_recipe(ROOT / "recipes/debug/memory.yaml", overrides).recipe
    needed = memory(shape_of(recipe), layout_of(recipe))
    assert (needed.total - needed.overhead) / MIB == pytest.approx(MEASURED_NEOX_MIB[backward_order], rel=0.15)


@pytest.mark.parametrize("overrides", MEASURED_FROZEN_MIB, ids=" ".join)
def test_predicted_peak_is_near_the_measured_one_where_parts_are_frozen(overrides: tuple[str, ...]) -> None:
    recipe = load_recipe(ROOT / "recipes/debug/memory.yaml", overrides).recipe
    needed = memory(shape_of(recipe), layout_of(recipe))
    assert (needed.total - needed.overhead) / MIB == pytest.approx(MEASURED_FROZEN_MIB[overrides], rel=0.05)


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    [(1, 2 + 4 + 12 / 64), (2, 2 + (4 + 12) / 64), (3, (2 + 4 + 12) / 64)],
)
def test_stages_shard_what_zero_says(stage: int, bytes_per_parameter: float) -> None:
    assert memory(SHAPE, on(stage=stage)).state == pytest.approx(bytes_per_parameter * SHAPE.parameters.total)


def test_one_gpu_under_autocast_holds_fp32_weights_and_their_casts() -> None:
    needed = memory(SHAPE, on(stage=0, num_gpus=1))
    assert needed.state == 16 * SHAPE.parameters.total
    assert needed.gathered_weights == 2 * SHAPE.parameters.total


def test_offload_moves_bytes_to_the_host() -> None:
    here = memory(SHAPE, on(stage=3))
    away = memory(SHAPE, on(stage=3, offload_optimizer="cpu", offload_parameters="cpu"))
    assert away.offloaded == here.optimizer + here.weights
    assert away.total == pytest.approx(here.total - 1.03 * away.offloaded)
    assert away.optimizer == away.weights == 0


def test_sequential_keeps_one_head_and_joint_all_logits() -> None:
    sequential, joint = memory(SHAPE, LAYOUT), memory(SHAPE, on(backward_order="joint"))
    positions = LAYOUT.micro_batch_size * SHAPE.seq_len
    assert sequential.logits <= 1024 * MIB
    assert joint.logits >= positions * SHAPE.vocab_size * 4 * 4
    one_head = (joint.head_activations - sequential.head_activations) / 3
    assert sequential.head_activations > one_head > 0


def test_a_frozen_trunk_keeps_nothing_and_a_frozen_matrix_has_no_gradient() -> None:
    recipe = load_recipe(ROOT / "recipes/paper/6.7b_n4.yaml", ["freeze=[trunk,unembedding]"]).recipe
    frozen, whole = memory(shape_of(recipe), LAYOUT), memory(SHAPE, LAYOUT)
    positions = LAYOUT.micro_batch_size * SHAPE.seq_len
    at_work = positions * layer_bytes(SHAPE.layer, LAYOUT)
    assert frozen.trunk_activations == max(0, at_work - frozen.head_activations - frozen.logits) < at_work
    assert frozen.unembedding_gradient == 0 < whole.unembedding_gradient
    assert frozen.head_activations == whole.head_activations
    assert memory(shape_of(recipe), on(recomputes_trunk=True)) == frozen


def test_mixtures_keep_the_states_of_a_frozen_trunk_only() -> None:
    """Layers that gradients pass keep these anyway, as their inputs."""
    for frozen in ("[]", "[trunk]"):
        plain, mixed = (
            memory(shape_of(load_recipe(ROOT / "recipes/debug/memory.yaml", overrides).recipe), LAYOUT)
            for overrides in ([f"freeze={frozen}"], [f"freeze={frozen}", "adapt.layer_mix={}"])
        )
        assert (mixed.trunk_activations > plain.trunk_activations) == (frozen == "[trunk]")


def test_low_rank_updates_leave_inputs_of_frozen_matrices_out() -> None:
    layer, all_seven = SHAPE.layer, ["q", "k", "v", "o", "gate", "up", "down"]
    kept = [layer_bytes(layer, on(stage=3), frozenset(all_seven[:count])) for count in range(8)]
    one, inner = (
        2 * layer.width,
        2 * layer.intermediate_size,
    )  # bytes in bf16; q, k and v share one input, gate and up another
    assert [after - before for before, after in pairwise(kept)] == [one, 0, 0, 0, one, 0, inner]
    assert kept[-1] == layer_bytes(layer, on(stage=3))


def test_chained_heads_are_alive_together() -> None:
    chained = shape_of(Recipe.model_validate({"heads": {"kind": "chained"}}))
    parallel = shape_of(Recipe())
    layout = layout_of(Recipe())
    assert memory(chained, layout).head_activations > 3 * memory(parallel, layout).head_activations / 1.5


def test_checkpointing_keeps_inputs_of_layers_and_works_where_heads_have_been() -> None:
    """Heads with less to keep than a layer of the trunk leave too little."""
    small = shape_of(load_recipe(ROOT / "recipes/paper/6.7b_n4.yaml", ["heads.kind=medusa"]).recipe)
    for shape in (SHAPE, small):
        kept, recomputed = memory(shape, LAYOUT), memory(shape, on(recomputes_trunk=True))
        state = LAYOUT.micro_batch_size * shape.seq_len * 2 * shape.layer.width
        one_layer = kept.trunk_activations / shape.num_trunk_layers
        then = max(one_layer + BOUNDARY_STATES * state, kept.head_activations + kept.logits)
        working = recomputed.trunk_activations + recomputed.head_activations + recomputed.logits
        assert working == pytest.approx(shape.num_trunk_layers * state + then)
        assert recomputed.head_activations == kept.head_activations


def test_recipes_may_set_sizes_of_buffers() -> None:
    keys = "strategy.deepspeed={zero_optimization: {reduce_bucket_size: 1e6, stage3_max_live_parameters: auto}}"
    recipe = load_recipe(ROOT / "recipes/paper/13b_n4.yaml", [keys]).recipe
    shape, layout = shape_of(recipe), layout_of(recipe)
    assert memory(shape, layout).reduction_buckets == 2 * 4 * 1e6
    assert memory(shape, layout).gathered_weights == 2 * 1e9


def test_document_attention_pays_for_a_mask_where_it_needs_one() -> None:
    for precision, pays in (("bf16", False), ("fp32", True)):
        fields = ["data.document_mask=true", f"run.precision={precision}"]
        masked = shape_of(load_recipe(ROOT / "recipes/paper/6.7b_n4.yaml", fields).recipe)
        assert (memory(masked, LAYOUT).trunk_activations > memory(SHAPE, LAYOUT).trunk_activations) == pays


def test_largest_micro_batch_fits_and_the_next_does_not() -> None:
    limit = 79 * GIB
    most = most_micro_rows(SHAPE, LAYOUT, limit)
    fitting, beyond = (memory(SHAPE, LAYOUT.with_rows(rows, rows)).total for rows in (most, most + 1))
    assert fitting <= limit < beyond
    assert most_micro_rows(SHAPE, LAYOUT, 10 * GIB) == 0
