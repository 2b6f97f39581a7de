"""Laws over tiny decoders of transformers: every architecture with a head kind and an objective of its own."""

import pytest
import torch

from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.architectures import SETTINGS, architecture_recipe
from tests.support.tiny import HEAD_KINDS, gradients_of, tiny_rows

pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[transformers]'"
)
TOLERANCE = 2e-6
"""Norms and routers of transformers compute in float32 whatever they are given."""
OBJECTIVES = (
    {"objective": {"label_smoothing": 0.1, "z_loss": 0.01}},
    {"objective": {"balance": "rms"}},
    {"objective": {"distill": {"divergence": "forward_kl", "top_k": 20}}},
    {"objective": {"token_order": {"weight": 0.7, "window_size": 6}}},
    {"memory": {"recompute_trunk": True, "recompute_heads": True}},
)
ORDERS = ("joint", "sequential", "bridged")
NAMES = list(SETTINGS)
KINDS = [kind for kind in HEAD_KINDS if not kind.endswith("replicated")]


def exact_model(recipe: Recipe) -> MtpModel:
    """The recipe's model in float64 with noise on every parameter, so that nothing is zero or one by construction."""
    architecture_of(recipe.model).config._experts_implementation = "eager"  # the others know no float64
    model = build_model(recipe).to(torch.float64)
    model.tie_word_embeddings()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def assert_orders_agree(name: str, kind: str, options: dict[str, object], *, documents: bool, masked: bool) -> None:
    results = {}
    for order in ORDERS:
        sections = {key: dict(value) for key, value in options.items()}
        sections["objective"] = {"backward_order": order, "chunk_mib": 0.002, **sections.get("objective", {})}
        heads = HEAD_KINDS[kind] | {"layers_from_trunk": False}
        recipe = architecture_recipe(name, heads=heads, data={"document_mask": documents}, **sections)
        tokens, numbers, mask = tiny_rows(recipe, 2)
        model = exact_model(recipe)
        results[order] = gradients_of(model, recipe, (tokens, numbers, mask if masked else None))
    wanted_losses, wanted = results.pop("joint")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanted.keys() == trained
    for order, (losses, gradients) in results.items():
        for found, expected in zip(losses, wanted_losses, strict=True):
            torch.testing.assert_close(found.nll_sums, expected.nll_sums, rtol=TOLERANCE, atol=0)
        assert gradients.keys() == wanted.keys()
        least = 1e-9 * max(float(gradient.norm()) for gradient in wanted.values())  # zero but for rounding: key biases
        errors = {
            key: float((gradients[key] - wanted[key]).norm() / wanted[key].norm().clamp(min=least)) for key in wanted
        }
        assert max(errors.values()) <= TOLERANCE, (order, max(errors, key=errors.__getitem__), max(errors.values()))


@pytest.mark.parametrize("name", NAMES)
def test_backward_orders_agree(name: str) -> None:
    """Law 1."""
    place = NAMES.index(name)
    documents = name != "qwen3_next"
    kind, options = KINDS[place % len(KINDS)], OBJECTIVES[place % len(OBJECTIVES)]
    assert_orders_agree(name, kind, options, documents=documents, masked=place % 2 == 0)
