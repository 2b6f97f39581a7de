"""Losses and predictions of held-out sequences: forward only, one offset after the other."""

from dataclasses import replace

import torch
from torch import Tensor

from mtp_lightning.losses.distillation import Distillation
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.schema.objective import DistillSection
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import LossTerms, Objective, OffsetLosses


@torch.no_grad()
def evaluate(model: MtpModel, batch: MicroBatch, objective: Objective) -> OffsetLosses:
    """Losses, predictions and overlaps of every offset, one after the other, without gradients."""
    plain = replace(objective, section=objective.section.model_copy(update={"distill": None, "balance": "none"}))
    terms = LossTerms(model, batch, plain)
    overlaps = torch.ones_like(batch.targets, dtype=plain.coefficients.dtype)
    hiddens = model.hidden_states(batch.tokens, batch.documents)
    for offset, hidden in hiddens.items():
        term = terms.for_offset(offset)[0]
        if offset == 1:
            model.unembedding([1], [hidden], [term])
            continue
        distances = torch.ones_like(overlaps[0].flatten())
        term.distillation = _distance(terms, offset, distances)
        model.unembedding([offset], [hidden], [term], teacher=hiddens[1])
        overlaps[offset - 1] -= distances.view_as(overlaps[0])
    return terms.losses()._replace(overlaps=overlaps)


def _distance(terms: LossTerms, offset: int, distances: Tensor) -> Distillation:
    """Compare all of an offset's distribution with the main head's by total variation, kept for each row."""
    section = DistillSection(divergence="tv", top_k=terms.model.section.vocab_size)
    has_teacher, weight = terms.has_teacher[offset - 1].flatten(), torch.zeros_like(terms.objective.coefficients[0])
    matrix = terms.model.unembedding.matrix_index(1)
    return Distillation(section, offset - 1, has_teacher, weight, matrix, row_losses=distances)
