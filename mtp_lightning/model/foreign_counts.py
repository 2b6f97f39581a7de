"""What a model of transformers' classes holds and multiplies by, counted on the meta device for the planner."""

import functools
import json
from collections import Counter

import torch

from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.hidden_matrices import hidden_matrices
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.roles import role_of
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.draft_vocabulary import with_first_ids
from mtp_lightning.recipe.schema.model import ModelSection
from mtp_lightning.recipe.schema.root import Recipe

CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Settings that say how many experts a token is sent to."""


def parameters_by_role(recipe: Recipe) -> Counter[str]:
    """Count the parameters of a recipe's model by their roles."""
    return Counter(json.loads(_parameters_by_role(json.dumps(recipe.model_dump(mode="json"), sort_keys=True))))


@functools.lru_cache(maxsize=32)
def _parameters_by_role(recipe: str) -> str:
    counts: Counter[str] = Counter()
    with torch.device("meta"):
        model = MtpModel(with_first_ids(Recipe.model_validate(json.loads(recipe))))
    for name, parameter in model.named_parameters():
        counts[role_of(name)] += parameter.numel()
    return json.dumps(counts)


@functools.lru_cache(maxsize=32)
def _trained(recipe: str) -> tuple[int, int]:
    """Count what Muon steps, and what Adafactor keeps: sums over rows and columns, and of vectors every entry."""
    own = with_first_ids(Recipe.model_validate(json.loads(recipe)))
    with torch.device("meta"):
        model = MtpModel(own)
    freeze(model, own)
    names = hidden_matrices(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sides = sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel() for p in trained)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names), sides


def trained_matrices(recipe: Recipe) -> int:
    """Count the parameters of a recipe's model that Muon steps."""
    return _trained(json.dumps(recipe.model_dump(mode="json"), sort_keys=True))[0]


def trained_sides(recipe: Recipe) -> int:
    """Count the state that Adafactor keeps of a recipe's model."""
    return _trained(json.dumps(recipe.model_dump(mode="json"), sort_keys=True))[1]


def layer_entries(section: ModelSection) -> list[int]:
    """Count, for each layer, the entries of matrices that a position is multiplied by: of experts, the chosen ones."""
    architecture = architecture_of(section)
    chosen = next((value for name in CHOSEN if (value := getattr(architecture.config, name, None))), 1)
    return [
        sum(
            parameter.numel() * chosen // parameter.shape[0]
            if "experts." in name and parameter.dim() == 3
            else parameter.numel()
            for name, parameter in layer.named_parameters()
            if parameter.dim() > 1
        )
        for layer in architecture.layers
    ]
