"""Tiny models and batches for tests: every head kind, ragged documents, optional loss mask."""

from typing import Any

import torch
from torch import Tensor

from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import shifted_targets
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import MicroBatch, count_scored
from mtp_lightning.training.step.objective import Objective, OffsetLosses
from mtp_lightning.training.step.rollout import RolloutDraw

HEAD_KINDS: dict[str, dict[str, object]] = {
    "parallel": {"kind": "parallel"},
    "parallel_two_layers": {"kind": "parallel", "layers_per_head": 2, "layers_from_trunk": False},
    "parallel_replicated": {"kind": "parallel", "unembedding": "replicated"},
    "linear": {"kind": "linear"},
    "causal": {"kind": "chained", "order": "causal"},
    "anticausal": {"kind": "chained", "order": "anticausal"},
    "sequential": {"kind": "sequential"},
    "sequential_pre_norm": {"kind": "sequential", "hidden": "pre_norm", "concatenation": "hidden_first"},
    "recursive": {"kind": "recursive"},
    "medusa": {"kind": "medusa"},
    "medusa_replicated": {"kind": "medusa", "unembedding": "replicated"},
}

NEOX: dict[str, object] = {
    "num_key_value_heads": None,
    "head_dim": 6,
    "partial_rotary_factor": 0.4,
    "rope_scaling": {"original_positions": 8},
    "norm": "layer",
    "mlp": "gelu",
    "parallel_residual": True,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}
"""Everything that a model of the GPT-NeoX type does otherwise, with scaled rotary positions."""


def tiny_recipe(**sections: dict[str, object] | list[str]) -> Recipe:
    """A recipe of a few thousand parameters; keyword arguments overlay its sections."""
    defaults: dict[str, Any] = {
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "vocab_size": 13,
            "initializer_range": 0.3,
        },
        "heads": {"num_offsets": 4},
        "data": {"seq_len": 9},
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
    }
    for name, values in sections.items():
        defaults[name] = defaults.get(name, {}) | values if isinstance(values, dict) else values
    return Recipe.model_validate(defaults)


def tiny_model(recipe: Recipe, dtype: torch.dtype = torch.float64) -> MtpModel:
    """The recipe's model with noise on every parameter, so that nothing is zero or one by construction."""
    model = build_model(recipe).to(dtype)
    model.tie_word_embeddings()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.1 * noise.to(dtype)
    return model


def tiny_rows(recipe: Recipe, num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows: tokens, documents with at least one boundary, and a loss mask; each (R, T+n)."""
    generator = torch.Generator().manual_seed(seed)
    length = recipe.data.seq_len + recipe.heads.num_offsets
    tokens = torch.randint(recipe.model.vocab_size, (num_rows, length), generator=generator)
    documents = (torch.rand(num_rows, length, generator=generator) < 0.15).cumsum(1)
    mask = torch.rand(num_rows, length, generator=generator) < 0.7
    return tokens, documents, mask


def gradients_of(
    model: MtpModel,
    recipe: Recipe,
    rows: tuple[Tensor, Tensor, Tensor | None],
    weights: list[float] | None = None,
    step: int = 0,
) -> tuple[list[OffsetLosses], dict[str, Tensor]]:
    """Losses and gradients of one optimizer step over the given rows, cut into the recipe's micro-batches."""
    tokens, documents, mask = rows
    targets = shifted_targets(tokens, documents, recipe.heads.num_offsets, mask)
    objective = Objective(
        recipe.objective,
        weights or [1.0] * recipe.heads.num_offsets,
        count_scored(targets, recipe).to(torch.float64),
        num_ordered=(documents[:, 1] == documents[:, 0]).sum() + 5,
        predicts=True,
        teacher_counts=teacher_positions(targets).sum((1, 2)).to(torch.float64),
        rollout=RolloutDraw.at(recipe, step),
    )
    model.zero_grad()
    losses = []
    for start in range(0, len(tokens), recipe.batch.micro_batch_size):
        part = slice(start, start + recipe.batch.micro_batch_size)
        batch = MicroBatch(tokens[part], documents[part], targets[:, part])
        losses.append(accumulate_gradients(model, batch, objective, torch.Tensor.backward))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found - expected).detach().norm() / expected.detach().norm().clamp(min=1e-300))
