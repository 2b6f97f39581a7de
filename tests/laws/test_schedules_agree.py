"""Law 1: sequential = bridged = joint, values and gradients, for every head kind, mask, chunk and accumulation."""

import torch

from tests.support.covering import every_pair
from tests.support.tiny import HEAD_KINDS, NEOX, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows

TOLERANCE = 1e-10
OBJECTIVES = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1, "z_loss": 0.01},
    "balanced": {"balance": "rms"},
    "ordered": {"token_order": {"weight": 0.7, "window_size": 6}},
    "recomputed": {"memory": {"recompute_trunk": True, "recompute_heads": True}},
}

MODELS = {"plain": {}, "tied": {"tie_word_embeddings": True, "qkv_bias": True, "qk_norm": True}, "neox": NEOX}
WEIGHTS = {
    "equal": None,
    "two of four": [1.0, 0.0, 0.5, 0.0],
    "main alone": [1.0, 0.0, 0.0, 0.0],
    "falling": [1.0, 0.3, 0.2, 0.1],
}


def assert_same_step(
    heads, objective, *, attention="window", accumulation=1, chunk_rows=5, masked=True, weights=None, model=None
):
    """Run both lean backward orders against the joint oracle."""
    chunk_mib = chunk_rows * 13 * 8 / 2**20
    memory = objective.get("memory", {})
    objective = {name: value for name, value in objective.items() if name != "memory"}
    results = {}
    for backward_order in ("joint", "sequential", "bridged"):
        recipe = tiny_recipe(
            heads=heads,
            objective={"backward_order": backward_order, "chunk_mib": chunk_mib} | objective,
            memory=memory,
            data={"document_mask": attention == "document"},
            model=model or {},
            batch={"global_batch_size": 2 * accumulation, "micro_batch_size": 2},
        )
        tokens, documents, mask = tiny_rows(recipe, 2 * accumulation)
        rows = (tokens, documents, mask if masked else None)
        results[backward_order] = gradients_of(tiny_model(recipe), recipe, rows, weights)
    expected_losses, expected = results.pop("joint")
    assert len(expected) > 20
    for backward_order, (losses, gradients) in results.items():
        for found, wanted in zip(losses, expected_losses, strict=True):
            sums = (found.nll_sums, wanted.nll_sums)
            torch.testing.assert_close(*sums, rtol=TOLERANCE, atol=0, equal_nan=True)
            assert torch.equal(found.predictions, wanted.predictions)
        assert gradients.keys() == expected.keys()
        errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
        assert max(errors.values()) <= TOLERANCE, (backward_order, errors)


def can_be_of_any(*, kind, model, isolated, **_):
    """A tied unembedding is one, not one for each offset; the main head of an anticausal chain reads the others."""
    return (model, kind[-10:]) != ("tied", "replicated") and not (isolated and kind == "anticausal")


@every_pair(
    can_be_of_any,
    kind=HEAD_KINDS,
    objective=OBJECTIVES,
    model=MODELS,
    attention=["window", "document"],
    accumulation=[1, 3],
    chunk_rows=[1, 7, 1000],
    masked=[False, True],
    isolated=[False, True],
    weights=WEIGHTS,
)
def test_schedules_agree(kind, objective, model, attention, accumulation, chunk_rows, masked, isolated, weights):
    shape = {"attention": attention, "accumulation": accumulation, "chunk_rows": chunk_rows, "masked": masked}
    heads = HEAD_KINDS[kind] | ({"detach_trunk": True} if isolated else {})
    assert_same_step(heads, OBJECTIVES[objective], model=MODELS[model], weights=WEIGHTS[weights], **shape)
