"""A decoder of transformers as the trunk: scores as its own forward computes them, for every architecture."""

import pytest
import torch

from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.architectures import SETTINGS, architecture_recipe, judge_of

pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[transformers]'"
)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def perturbed(recipe: Recipe) -> MtpModel:
    """The recipe's model with noise on every parameter, so that nothing is zero or one by construction."""
    model = build_model(recipe).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens_of(model: MtpModel, num_positions: int = 11) -> torch.Tensor:
    return torch.randint(model.section.vocab_size, (3, num_positions), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_main_head_scores_as_in_transformers(name: str) -> None:
    recipe = architecture_recipe(name, data={"document_mask": False})
    model = perturbed(recipe)
    tokens = tokens_of(model)
    with torch.no_grad():
        hidden = model.hidden_states(tokens, torch.zeros_like(tokens), [1])[1]
        ours = model.unembedding.logits(1, hidden)
        theirs = judge_of(model)(input_ids=tokens[:, : hidden.shape[1]]).logits
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "qwen3_next"])
def test_documents_do_not_see_each_other(name: str) -> None:
    model = perturbed(architecture_recipe(name, data={"document_mask": True}))
    tokens = tokens_of(model)
    documents = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3]).expand(3, -1)
    with torch.no_grad():
        hidden = model.hidden_states(tokens, documents, [1])[1]
        packed = model.unembedding.logits(1, hidden)
        judge = judge_of(model)
        alone = torch.cat([judge(input_ids=part).logits for part in tokens.split([3, 1, 4, 3], 1)], 1)
    torch.testing.assert_close(packed, alone[:, : packed.shape[1]], **TOLERANCE)
