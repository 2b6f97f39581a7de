"""What a predicted step must obey, whatever its constants."""

from dataclasses import replace

import pytest

from mtp_lightning.planner.flops import flops_per_position
from mtp_lightning.planner.hardware import hardware, known_hardware
from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.memory import memory
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.planner.throughput import (
    COMPILED_LOGIT_BYTES,
    LIGER_LOGIT_PASSES,
    LOGIT_BYTES,
    MEMORY_EFFICIENCY,
    communication_bytes,
    communication_s,
    step_time,
)
from mtp_lightning.recipe.loading.load import load_recipe
from tests.structure.source import ROOT
from tests.support.tiny import HEAD_KINDS, tiny_recipe

PAPER = load_recipe(ROOT / "recipes/paper/13b_n4.yaml").recipe
SHAPE, LAYOUT, H100 = shape_of(PAPER), layout_of(PAPER), hardware("H100")


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_shape_counts_the_operations_of_its_recipe(kind: str) -> None:
    recipe = tiny_recipe(model={"num_hidden_layers": 9}, heads=HEAD_KINDS[kind])
    assert shape_of(recipe).flops_per_position == flops_per_position(recipe)


@pytest.mark.parametrize("name", known_hardware())
def test_no_prediction_beats_the_peak(name: str) -> None:
    device = hardware(name)
    time = step_time(SHAPE, LAYOUT, device).total_s
    operations = LAYOUT.rows_per_step * SHAPE.seq_len * SHAPE.flops_per_position / LAYOUT.num_gpus
    assert 0.1 < operations / time / device.peak("bf16") < 0.7


def test_checkpointing_costs_less_than_a_third() -> None:
    """A forward pass is a third of the step, and its last product is not computed again."""
    without = step_time(SHAPE, replace(LAYOUT, recomputes_trunk=False), H100).compute_s
    assert 1.1 < step_time(SHAPE, LAYOUT, H100).compute_s / without < 4 / 3


def test_zero_sends_what_its_stages_say() -> None:
    whole = 2 * SHAPE.parameters.total * 127 / 128
    sent = {stage: list(communication_bytes(SHAPE, replace(LAYOUT, stage=stage)).values()) for stage in (0, 1, 2, 3)}
    micro_batches = LAYOUT.num_micro_batches
    assert micro_batches > 1
    assert sent[0] == [0, 0]
    in_fp32 = 2 * whole
    assert sent[1] == [whole, in_fp32]
    assert sent[2] == [whole, micro_batches * in_fp32]
    assert sent[3] == [2 * micro_batches * whole, micro_batches * in_fp32]
    rounded = communication_bytes(SHAPE, replace(LAYOUT, stage=1, reduce_bytes=2))
    assert list(rounded.values()) == [whole, whole]


def test_network_between_nodes_is_slower_than_within_one() -> None:
    one, two = (replace(LAYOUT, num_gpus=gpus) for gpus in (8, 16))
    assert communication_s(SHAPE, two, H100) > communication_s(SHAPE, one, H100)
    assert communication_s(SHAPE, replace(LAYOUT, num_gpus=1), H100) == 0


def test_more_gpus_never_make_a_gpu_faster() -> None:
    speeds = []
    for num_gpus in (8, 64, 256, 1024):
        layout = layout_of(PAPER, num_gpus)
        speeds.append(layout.rows_per_step / num_gpus / step_time(SHAPE, layout, H100).total_s)
    assert speeds == sorted(speeds, reverse=True)


def test_offloading_costs_time() -> None:
    plain = step_time(SHAPE, LAYOUT, H100)
    on_cpu, on_disk = (step_time(SHAPE, replace(LAYOUT, offload_optimizer=place), H100) for place in ("cpu", "nvme"))
    assert plain.update_s < on_cpu.update_s < on_disk.update_s
    weights = step_time(SHAPE, replace(LAYOUT, offload_parameters="cpu"), H100)
    assert weights.communication_s > plain.communication_s


def test_tiny_models_wait_for_the_host() -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml").recipe
    assert step_time(shape_of(recipe), layout_of(recipe), H100).launch_s > 0
    assert step_time(SHAPE, LAYOUT, H100).launch_s == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_frozen_is_neither_walked_back_nor_updated_nor_sent(stage: int) -> None:
    """A step of heads on a frozen trunk takes between a third and a half of the whole step; with updates, more."""
    whole, heads, updates = (
        shape_of(load_recipe(ROOT / "recipes/paper/13b_n4.yaml", overrides).recipe)
        for overrides in ([], ["freeze=[trunk,unembedding]"], ["adapt.lora={}", "freeze=[unembedding]"])
    )
    layout = replace(LAYOUT, stage=stage, recomputes_trunk=False)
    all_s, heads_s, updates_s = (step_time(shape, layout, H100) for shape in (whole, heads, updates))
    assert 1 / 3 < heads_s.compute_s / all_s.compute_s < 0.5 < updates_s.compute_s / all_s.compute_s < 0.8
    share = heads.num_trainable / whole.num_trainable
    assert share < 0.1
    assert heads_s.update_s == pytest.approx(share * all_s.update_s)
    sent, whole_sent = communication_bytes(heads, layout), communication_bytes(whole, layout)
    assert sent["reduce_gradients"] == pytest.approx(share * whole_sent["reduce_gradients"])
    gathered = sent["gather_weights"] / whole_sent["gather_weights"]
    assert 0.5 < gathered < 0.6 if stage == 3 else gathered == pytest.approx(share)


def test_cost_of_four_offsets_is_below_the_papers() -> None:
    """[Gloeckle 2024, table S5] measured 1.09 for 13B with FSDP, and calls the excess removable."""
    one = shape_of(load_recipe(ROOT / "recipes/paper/13b_n1.yaml").recipe)
    ratio = step_time(SHAPE, LAYOUT, H100).total_s / step_time(one, LAYOUT, H100).total_s
    assert 1 < ratio < 1.09


@pytest.mark.parametrize("backward_order", ["sequential", "joint"])
def test_distillation_pays_for_the_scores_of_its_teacher(backward_order: str) -> None:
    """Three offsets, each with one more product of three; joint has the scores already."""
    distilled = shape_of(load_recipe(ROOT / "recipes/paper/13b_n4.yaml", ["objective.distill={}"]).recipe)
    layout = replace(LAYOUT, backward_order=backward_order)
    plain, taught = (step_time(shape, layout, H100) for shape in (SHAPE, distilled))
    assert distilled.flops_per_position == SHAPE.flops_per_position
    operations = 0 if backward_order == "joint" else 2 * 3 * SHAPE.matrix
    positions = layout.num_micro_batches * layout.micro_batch_size * SHAPE.seq_len
    seconds = positions * operations / (H100.peak("bf16") * H100.product_efficiency)
    assert taught.products_s - plain.products_s == pytest.approx(seconds)
    assert taught.memory_bound_s > plain.memory_bound_s


def test_a_compiled_loss_moves_fewer_bytes() -> None:
    """Fewer than the plain one, and no other part of a step is another."""
    recipe = load_recipe(ROOT / "recipes/paper/1.3b_n4.yaml", ["memory.compile=true"]).recipe
    shape, layout = shape_of(recipe), layout_of(recipe)
    compiled, plain = (step_time(shape, replace(layout, compiles_loss=is_on), H100) for is_on in (True, False))
    assert layout.compiles_loss
    entries = layout.num_micro_batches * layout.micro_batch_size * shape.seq_len * shape.passes.num_scored
    saved = entries * (LOGIT_BYTES - COMPILED_LOGIT_BYTES) / (H100.memory_bytes_per_s * MEMORY_EFFICIENCY)
    assert plain.memory_bound_s - compiled.memory_bound_s == pytest.approx(saved)
    assert plain.products_s == compiled.products_s


def test_liger_passes_over_scores_three_times_and_keeps_a_gradient_of_its_own() -> None:
    """A third of the bytes in the type of the products; and V x D of fp32 that our own loss adds up in place."""
    path = ROOT / "recipes/paper/1.3b_n4.yaml"
    recipe, other = (load_recipe(path, [f"memory.loss_kernel={kernel}"]).recipe for kernel in ("own", "liger"))
    shape, own, layout = shape_of(recipe), layout_of(recipe), layout_of(other)
    seconds = step_time(shape, own, H100).memory_bound_s - step_time(shape, layout, H100).memory_bound_s
    entries = layout.num_micro_batches * layout.micro_batch_size * shape.seq_len * shape.passes.num_scored
    saved = entries * (LOGIT_BYTES - LIGER_LOGIT_PASSES * 2) / (H100.memory_bytes_per_s * MEMORY_EFFICIENCY)
    assert seconds == pytest.approx(saved)
    more = memory(shape, layout).unembedding_gradient - memory(shape, own).unembedding_gradient
    assert more == shape.matrix * 4
