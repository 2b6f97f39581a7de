"""A rank of a group that shares windows: its step is compared with that of whole windows on one process.

Arguments: JSON of cells, each the sections of a recipe and where it differs. The first rank prints what was found of
each, as JSON: the largest relative error of a gradient, and whether the figures of a step and a validation are equal.
"""

import json
import sys

import torch
import torch.distributed as dist

from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import shifted_targets
from mtp_lightning.model.sequence_parallel import slice_of_this_rank
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.draft_vocabulary import with_draft_ids
from mtp_lightning.training.step.backward_order import accumulate_gradients, evaluate
from mtp_lightning.training.step.batch import count_scored, prepare_batch
from mtp_lightning.training.step.metrics import OffsetMetrics
from mtp_lightning.training.step.objective import Objective
from tests.support.tiny import relative_error, tiny_model, tiny_recipe, tiny_rows

ROWS = 4


def step_of(recipe, rows, sequence, ranks, backward_order):
    """Gradients of one optimizer step, and figures of it and of a validation, summed over ranks."""
    model, section = tiny_model(recipe), recipe.objective.model_copy(update={"backward_order": backward_order})
    targets = shifted_targets(rows["tokens"], rows["documents"], recipe.heads.num_offsets, rows["loss_mask"])
    objective = Objective(
        section,
        [1.0, 0.5, 0.3, 0.2][: recipe.heads.num_offsets],
        count_scored(targets, recipe).to(torch.float64),
        predicts=True,
        teacher_counts=teacher_positions(targets).sum((1, 2)).to(torch.float64),
    )
    own = rows
    if sequence is not None:
        share = ROWS * sequence.size // ranks.size
        first = ranks.rank // sequence.size * share
        own = {name: values[first : first + share] for name, values in rows.items()}
    figures = []
    for run in (
        lambda batch: accumulate_gradients(model, batch, objective, torch.Tensor.backward),
        lambda batch: evaluate(model, batch, objective),
    ):
        metrics = OffsetMetrics(recipe.heads.num_offsets)
        for batch in prepare_batch(own, recipe, 0, sequence).micro_batches:
            metrics.update(batch.targets, run(batch))
        sums = {name: value.double() for name, value in metrics.metric_state.items()}
        figures.append(sums if sequence is None else {name: ranks.sum(value) for name, value in sums.items()})
    none = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    gradients = {name: none[name] if p.grad is None else p.grad for name, p in model.named_parameters()}
    if sequence is not None:
        gradients = {name: ranks.sum(gradient) for name, gradient in gradients.items()}
    return gradients, figures


def differences(cell, ranks, sequence):
    """Compare a cell with whole windows in the joint order."""
    recipe = tiny_recipe(**cell["sections"])
    if recipe.heads.draft_vocabulary is not None:
        recipe = with_draft_ids(recipe, [0, 2, 3, 7, 11])
    tokens, documents, mask = tiny_rows(recipe, ROWS)
    rows = {"tokens": tokens, "documents": documents, "loss_mask": mask}
    expected, expected_figures = step_of(recipe, rows, None, ranks, "joint")
    found, figures = step_of(recipe, rows, sequence, ranks, recipe.objective.backward_order)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    unequal = [
        name
        for own, whole in zip(figures, expected_figures, strict=True)
        for name in own
        if not torch.allclose(own[name], whole[name], rtol=1e-10, atol=1e-10, equal_nan=True)
    ]
    return {"error": errors[worst], "worst": worst, "unequal": unequal, "size": sum(bool(e) for e in errors.values())}


def main(num_slices, cells):
    dist.init_process_group("gloo")
    ranks, sequence = Ranks(), slice_of_this_rank(int(num_slices))
    found = [differences(cell, ranks, sequence) for cell in json.loads(cells)]
    if ranks.is_first:
        print(json.dumps(found))
    ranks.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
