"""Draft vocabulary: training equals full logits that are then restricted, drafting a restricted argmax; same texts.

The oracle here knows nothing of `DraftVocabulary`: full logits of every offset, columns picked by a list, torch's own
losses.
"""

import math

import torch
from torch.nn import functional as F

from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.recipe.draft_vocabulary import with_draft_ids
from mtp_lightning.training.step.batch import prepare_batch
from tests.laws.test_schedules_agree import MODELS, TOLERANCE, can_be_of_any
from tests.support.covering import every_pair
from tests.support.tiny import HEAD_KINDS, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows

IDS = [1, 3, 4, 8, 9, 12]
V = 13
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda")
LOSSES = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1, "z_loss": 0.01},
    "balanced": {"balance": "rms"},
    "ordered": {"token_order": {"weight": 0.7, "window_size": 6}},
    **{name: {"distill": {"divergence": name, "alpha": [0.6], "beta": [0.9]}} for name in DIVERGENCES},
    "teacher learns": {"distill": {"divergence": "lk_lambda", "detach_teacher": False, "temperature": 1.7}},
    "three of them": {"distill": {"top_k": 3, "where": "confident", "confidence": 0.4}},
}
FREEZES = {"all trained": [], "frozen": ["trunk", "unembedding"]}


def recipe_of(heads, objective, *, ids=IDS, freeze=(), model=None):
    recipe = tiny_recipe(
        heads=heads | {"draft_vocabulary": len(ids)} if ids else heads,
        objective={"chunk_mib": 5 * V * 8 / 2**20} | objective,
        model=model or {},
        freeze=[*freeze],
    )
    return with_draft_ids(recipe, ids) if ids else recipe


def plain_step(model, recipe, rows):
    """Loss sums and gradients by full logits; every divergence written out from its definition."""
    tokens, documents, mask = rows
    section, n = recipe.objective, recipe.heads.num_offsets
    targets = shifted_targets(tokens, documents, n, mask)
    teachers = teacher_positions(targets)
    model.zero_grad()
    hiddens = model.hidden_states(tokens, documents)
    full = {}
    for k, hidden in hiddens.items():
        weight = model.unembedding.lm_heads[model.unembedding.matrix_index(k)].weight
        full[k] = (model.unembedding.normalize(k, hidden) @ weight.T).flatten(0, 1)
    total, sums, main_rms = torch.zeros((), dtype=torch.float64), [], None
    for k in range(1, n + 1):
        logits, wanted = full[k], targets[k - 1].flatten()
        if k > 1:
            logits = logits[:, IDS]
            wanted = torch.tensor([IDS.index(t) if t in IDS else IGNORE for t in wanted.tolist()])
        counts = wanted != IGNORE
        picked = logits[counts]
        smoothed = F.cross_entropy(picked, wanted[counts], label_smoothing=section.label_smoothing, reduction="none")
        losses = smoothed + section.z_loss * picked.logsumexp(1) ** 2
        sums.append(F.cross_entropy(picked, wanted[counts], reduction="sum").detach())
        factor = 1.0
        if section.balance == "rms":
            rms = losses.detach().square().mean().sqrt()
            main_rms = rms if main_rms is None else main_rms
            factor = main_rms / rms
        part = losses.mean() * factor
        if k > 1 and section.distill is not None:
            part = section.distill.alpha_of(k) * part
            part = part + section.distill.beta_of(k) * divergence(full, k, section.distill, teachers[k - 1].flatten())
        total = total + part
    if section.token_order is not None:
        return sums, None
    total.backward()
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def divergence(full, k, section, has_teacher):
    main = full[1].detach() if section.detach_teacher else full[1]
    total = torch.zeros((), dtype=torch.float64)
    for row in has_teacher.nonzero().flatten().tolist():
        teacher = main[row + k - 1]
        if int(teacher.argmax()) not in IDS:
            continue
        kept = teacher[IDS].topk(min(section.top_k or len(IDS), len(IDS))).indices
        p, q = ((x[IDS][kept] / section.temperature).softmax(0) for x in (teacher, full[k][row]))
        if section.where == "confident" and p.max() < section.confidence:
            continue
        forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        middle, overlap = (p + q) / 2, torch.minimum(p, q).sum()
        share = math.exp(-section.lk_rate * float(overlap.detach()))
        total = (
            total
            + {
                "forward_kl": forward,
                "reverse_kl": reverse,
                "jsd": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
                "tv": 1 - overlap,
                "lk_alpha": -overlap.log(),
                "lk_lambda": share * forward + (1 - share) * (1 - overlap),
            }[section.divergence]
        )
    return total / has_teacher.sum()


def with_scored_counts(recipe, rows):
    """Tokens, documents and mask as a batch, whose counts are those of a run."""
    tokens, documents, mask = rows
    batch = {"tokens": tokens, "documents": documents, "loss_mask": mask}
    return prepare_batch(batch, recipe, step=None)


@every_pair(
    lambda *, kind, model, **_: can_be_of_any(kind=kind, model=model, isolated=False),
    quick=24,
    kind=HEAD_KINDS,
    losses=LOSSES,
    model=MODELS,
    freeze=FREEZES,
    order=["sequential", "bridged", "joint"],
)
def test_training_equals_full_logits_restricted(kind, losses, model, freeze, order):
    if model == "tied" and freeze == "frozen":
        model = "plain"
    recipe = recipe_of(
        HEAD_KINDS[kind], LOSSES[losses] | {"backward_order": order}, model=MODELS[model], freeze=FREEZES[freeze]
    )
    rows = tiny_rows(recipe, 2)
    made = tiny_model(recipe)
    if freeze == "frozen":
        made.trunk.requires_grad_(requires_grad=False)
        made.unembedding.lm_heads.requires_grad_(requires_grad=False)
    sums, expected = plain_step(made, recipe, rows)
    losses_found, gradients = gradients_of(made, recipe, rows)
    torch.testing.assert_close(losses_found[0].nll_sums, torch.stack(sums), rtol=TOLERANCE, atol=0)
    if expected is not None:
        assert gradients.keys() == expected.keys()
        errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
        assert max(errors.values()) <= TOLERANCE, errors
