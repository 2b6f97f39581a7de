"""Windows that are cut over GPUs: what each keeps, sends and computes."""

import pytest

from mtp_lightning.errors import MtpError
from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.report import build_plan
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.planner.throughput import communication_bytes
from mtp_lightning.recipe import Recipe


def recipe(num_slices, seq_len, **model):
    return Recipe.model_validate(
        {
            "model": {"num_attention_heads": 8, "max_position_embeddings": seq_len, **model},
            "data": {"seq_len": seq_len},
            "run": {"precision": "bf16"},
            "batch": {"global_batch_size": 8, "micro_batch_size": 1},
            "strategy": {"kind": "zero3", "ranks_per_node": 8, "sequence_parallel": num_slices},
        }
    )


def test_a_window_of_four_slices_takes_what_a_slice_takes_and_a_copy_of_mixed_values():
    whole, cut = (build_plan(recipe(*own)).chosen for own in ((1, 2048), (4, 8192)))
    assert cut.memory.logits == whole.memory.logits
    assert cut.memory.state == whole.memory.state
    kept = cut.memory.trunk_activations / whole.memory.trunk_activations
    assert 1 < kept < 1.1
    assert (whole.layout.num_micro_batches, cut.layout.num_micro_batches) == (1, 4)
    assert whole.layout.rows_per_step == cut.layout.rows_per_step == 8
    assert cut.time.products_s == pytest.approx(4 * whole.time.products_s)
    assert cut.time.attention_s == pytest.approx(16 * whole.time.attention_s)


def test_what_is_exchanged_is_what_a_layer_sends():
    """Two passes of every layer, with queries, keys, values and mixed values of 2 of 8 ranks' own positions."""
    own = recipe(2, 1024, num_key_value_heads=2)
    shape, layout = shape_of(own), layout_of(own)
    width, positions = own.model.hidden_size * (2 + 2 * 2 / 8), 1024 / 2
    sent = communication_bytes(shape, layout)["exchange_heads"]
    assert sent == 2 * layout.num_micro_batches * shape.passes.all.layers * positions * width * 2 / 2
    assert communication_bytes(shape, layout_of(recipe(1, 1024))).keys() == {"gather_weights", "reduce_gradients"}
    assert shape.layer.exchanged_key_width(8) == 4 * shape.layer.key_width


def test_gpus_that_cannot_share_are_refused_and_left_out():
    with pytest.raises(MtpError, match=r"number of GPUs / strategy\.sequence_parallel=4; found 8 rows for 6 GPUs"):
        build_plan(recipe(4, 1024), num_gpus=6)
    assert [variant is not None for variant in build_plan(recipe(4, 1024)).scales] == [True] * 3 + [False] * 5
