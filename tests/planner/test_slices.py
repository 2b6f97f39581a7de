"""Windows that are cut over GPUs: what each keeps, sends and computes."""

import re

import pytest

from mtp_lightning.errors import MtpError
from mtp_lightning.planner.hardware import hardware, known_hardware
from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.memory import memory
from mtp_lightning.planner.report import build_plan
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.planner.throughput import communication_bytes
from mtp_lightning.recipe import Recipe, load_recipe
from tests.support.runs import ROOT


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


ROW = re.compile(r"^\| (1\.3|13)B \| (\d+) \| (\d) \| (tile, host|tile|) ?\| (.*) \|$", re.MULTILINE)


def test_the_windows_in_the_documentation_are_the_longest_that_fit():
    rows = ROW.findall((ROOT / "docs/howto/pretrain.md").read_text())
    assert len(rows) == 12
    for size, num_gpus, num_slices, saving, windows in rows:
        base = load_recipe(ROOT / f"recipes/paper/{size}b_n4.yaml").recipe
        layout = (base, int(num_gpus), int(num_slices), saving)
        for name, window in zip(known_hardware(), windows.split(" | "), strict=True):
            length, limit = 1024 * int(window.replace(",", "")), hardware(name).memory_bytes
            assert needed_bytes(length, *layout) <= limit
            assert needed_bytes(length * 9 // 8, *layout) > limit


def needed_bytes(seq_len, base, num_gpus, num_slices, saving):
    tile = {"mlp_tile": 4096} if "tile" in saving else {}
    changes = {
        "data": {"seq_len": seq_len},
        "model": {"max_position_embeddings": seq_len},
        "batch": {"micro_batch_size": 1, "global_batch_size": 64},
        "memory": {"recompute_trunk": True, "recompute_heads": True, **tile, "offload_activations": "host" in saving},
        "strategy": {"kind": "zero3", "num_nodes": num_gpus // 8, "sequence_parallel": num_slices},
    }
    sections = {name: getattr(base, name).model_copy(update=own) for name, own in changes.items()}
    recipe = base.model_copy(update=sections)
    return memory(shape_of(recipe), layout_of(recipe)).total
