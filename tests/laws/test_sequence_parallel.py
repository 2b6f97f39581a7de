"""Windows cut over ranks = whole windows on one process: gradients and figures, for every head kind and order."""

import json

import pytest

from mtp_lightning.diagnostics.parity import compare_strategies
from mtp_lightning.diagnostics.parity_matrix import ADAPTATIONS, BACKWARD_ORDERS, HEADS, STAGES, UNEMBEDDINGS, Cell
from tests.support.covering import covering_array
from tests.support.ranked import on_ranks
from tests.support.tiny import HEAD_KINDS, NEOX

TOLERANCE = 1e-10
OBJECTIVES = {
    "plain": {},
    "distilled": {"distill": {"alpha": [0.6], "beta": [0.9], "top_k": 5}},
    "distilled, main head learns": {"distill": {"detach_teacher": False}},
    "drafted": {"distill": {"beta": [0.9], "top_k": 4}, "label_smoothing": 0.1, "z_loss": 0.01},
}
MODELS = {
    "grouped": {},
    "one key": {"num_key_value_heads": 1},
    "as many keys": {"num_key_value_heads": 4, "tie_word_embeddings": True, "qk_norm": True, "qkv_bias": True},
    "neox": NEOX,
}
CELLS = covering_array(
    lambda *, kind, model, objective, num_offsets, **_: (
        (model, kind[-10:]) != ("as many keys", "replicated") and (num_offsets > 1 or objective == "plain")
    ),
    kind=HEAD_KINDS,
    backward_order=["sequential", "bridged", "joint"],
    objective=OBJECTIVES,
    model=MODELS,
    attention=["window", "document"],
    num_offsets=[4, 2, 1],
    accumulation=[1, 2],
    recomputes=[False, True],
)


UNDER_ZERO = covering_array(
    lambda *, heads, unembedding, adaptation, optimizer, **_: (
        (heads, unembedding) != ("sequential", "replicated")
        and (adaptation == "none" or (optimizer == "sgd" and unembedding == "shared"))
    ),
    stage=STAGES,
    backward_order=BACKWARD_ORDERS,
    heads=HEADS,
    unembedding=UNEMBEDDINGS,
    accumulation=[1, 3],
    adaptation=ADAPTATIONS,
    optimizer=["sgd", "muon"],
)


def sections_of(kind, backward_order, objective, model, attention, num_offsets, accumulation, recomputes):
    return {
        "heads": {"num_offsets": num_offsets, "draft_vocabulary": 5 if objective == "drafted" else None}
        | HEAD_KINDS[kind],
        "objective": {"backward_order": backward_order, "chunk_mib": 5 * 13 * 8 / 2**20} | OBJECTIVES[objective],
        "model": MODELS[model],
        "data": {"seq_len": 12, "document_mask": attention == "document"},
        "memory": {"recompute_trunk": recomputes, "recompute_heads": recomputes},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2 // accumulation},
    }


def assert_same_steps(cells, num_ranks, num_slices):
    arguments = json.dumps([{"sections": sections_of(*cell)} for cell in cells])
    printed = on_ranks("tests.support.sequence_ranks", num_ranks, str(num_slices), arguments)
    found = json.loads(printed.splitlines()[-1])
    assert len(found) == len(cells)
    bad = [(*cell, own) for cell, own in zip(cells, found, strict=True) if not own["error"] <= TOLERANCE]
    assert bad == []
    assert [(*cell, own["unequal"]) for cell, own in zip(cells, found, strict=True) if own["unequal"]] == []
    assert all(own["size"] > 10 for own in found), "so many gradients have a rounding error, so they are there"


def test_windows_on_two_ranks_are_whole_windows():
    assert_same_steps(CELLS[:4], 2, 2)


@pytest.mark.slow
def test_every_pair_is_equal_on_four_ranks():
    assert_same_steps(CELLS, 4, 4)


@pytest.mark.slow
def test_two_groups_of_two_ranks_share_the_rows():
    assert_same_steps(CELLS[::3], 4, 2)


@pytest.mark.slow
def test_every_stage_of_zero_is_equal(warm_ranks):
    names = ("stage", "backward_order", "heads", "unembedding", "accumulation", "adaptation", "optimizer")
    cells = [Cell(ranks=2, sequence_parallel=2, clips=True, **dict(zip(names, own, strict=True))) for own in UNDER_ZERO]
    outcomes = compare_strategies(cells)
    assert [outcome.cell for outcome in outcomes] == cells
    assert [outcome for outcome in outcomes if not outcome.is_good or not outcome.error] == []


@pytest.mark.slow
def test_a_window_four_times_as_long_takes_as_much_memory_of_each_of_four_ranks():
    """Bytes of all tensors alive at the peak of a step, beside weights and gradients: measured, not planned."""
    one, four, alone = (
        int(on_ranks("tests.support.sequence_memory", ranks, str(ranks), str(seq_len)).splitlines()[-1])
        for ranks, seq_len in ((1, 512), (4, 2048), (1, 2048))
    )
    print(f"\n512 positions on one rank {one:,} B, 2,048 on four {four:,} B each, on one {alone:,} B")
    assert 0.9 * one < four < 1.1 * one
    assert alone > 3.5 * one
