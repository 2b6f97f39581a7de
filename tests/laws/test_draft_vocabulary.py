"""Draft vocabulary: training equals full logits that are then restricted, drafting a restricted argmax; same texts.

The oracle here knows nothing of `DraftVocabulary`: full logits of every offset, columns picked by a list, torch's own
losses.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from mtp_lightning.decode import Tree, applicable_decoders, generate
from mtp_lightning.decode.drafting import draft_blockwise, draft_chain
from mtp_lightning.decode.sampling import Sampling
from mtp_lightning.errors import DecodingError
from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.draft_vocabulary import DraftVocabulary
from mtp_lightning.recipe.draft_vocabulary import with_draft_ids
from mtp_lightning.training.step.backward_order import evaluate
from mtp_lightning.training.step.batch import MicroBatch, prepare_batch
from mtp_lightning.training.step.metrics import OffsetMetrics
from mtp_lightning.training.step.objective import Objective
from tests.decode.oracles import LENGTH, PROMPTS, begun_session, full_logits, plain_texts
from tests.laws.test_decoding_law import NEW_TOKENS, PROMPT, ROWS, deviation, exact_law
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
QUICK = ("parallel", "medusa_replicated", "causal", "sequential", "recursive")
FREEZES = {"all trained": [], "frozen": ["trunk", "unembedding"]}


def recipe_of(heads, objective, *, ids=IDS, freeze=(), model=None):
    recipe = tiny_recipe(
        heads=heads | {"draft_vocabulary": len(ids)} if ids else heads,
        objective={"chunk_mib": 5 * V * 8 / 2**20} | objective,
        model=model or {},
        freeze=[*freeze],
    )
    return with_draft_ids(recipe, ids) if ids else recipe


def plain_step(model, recipe, rows, mapped=lambda scores: scores):
    """Loss sums and gradients by full logits; every divergence written out from its definition."""
    tokens, documents, mask = rows
    section, n = recipe.objective, recipe.heads.num_offsets
    targets = shifted_targets(tokens, documents, n, mask)
    teachers = teacher_positions(targets)
    model.zero_grad()
    hiddens = model.hidden_states(tokens, documents)
    full = {}
    for k, hidden in hiddens.items():
        matrix = model.unembedding.lm_heads[model.unembedding.matrix_index(k)]
        full[k] = mapped(F.linear(model.unembedding.normalize(k, hidden), matrix.weight, matrix.bias).flatten(0, 1))
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


@every_pair(
    lambda *, kind, model, **_: can_be_of_any(kind=kind, model=model, isolated=False),
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


@pytest.mark.parametrize("kind", ["parallel", "medusa_replicated", "sequential"])
@pytest.mark.parametrize("losses", ["smooth", "lk_lambda"])
def test_all_ids_in_any_order_give_the_full_result(kind, losses):
    """V' = V: exactly so in ascending order, up to rounding in another."""
    whole = recipe_of(HEAD_KINDS[kind], LOSSES[losses], ids=None)
    rows = tiny_rows(whole, 2)
    expected_losses, expected = gradients_of(tiny_model(whole), whole, rows)
    recipe = recipe_of(HEAD_KINDS[kind], LOSSES[losses], ids=range(V))
    found_losses, found = gradients_of(tiny_model(recipe), recipe, rows)
    assert torch.equal(found_losses[0].nll_sums, expected_losses[0].nll_sums)
    assert torch.equal(found_losses[0].predictions, expected_losses[0].predictions)
    model = tiny_model(recipe)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0)).tolist()
    model.unembedding.drafts = DraftVocabulary(tuple(order), V)
    permuted_losses, permuted = gradients_of(model, recipe, rows)
    assert torch.equal(permuted_losses[0].predictions, expected_losses[0].predictions)
    for gradients in (found, permuted):
        assert max(relative_error(gradients[name], expected[name]) for name in expected) <= TOLERANCE


@pytest.mark.parametrize("kind", ["linear", "medusa_replicated", "recursive"])
def test_validation_counts_what_cannot_be_drafted(kind):
    """Overlaps are sums of min(p, q) over all V, q 0 outside; losses are of targets inside; the others are counted."""
    recipe = recipe_of(HEAD_KINDS[kind], {"distill": {}})
    tokens, documents, mask = tiny_rows(recipe, 3)
    model = tiny_model(recipe)
    targets = shifted_targets(tokens, documents, 4, mask)
    objective = Objective(recipe.objective, [1.0] * 4, torch.ones(4, dtype=torch.float64), predicts=True)
    losses = evaluate(model, MicroBatch(tokens, documents, targets), objective)
    with torch.no_grad():
        hiddens = model.hidden_states(tokens, documents)
        full = {k: model.unembedding.logits(k, hidden) for k, hidden in hiddens.items()}
    p = full[1].softmax(-1)
    teachers = teacher_positions(targets)
    for k in range(2, 5):
        assert torch.isinf(full[k][..., 0]).all()
        q = torch.zeros_like(p)
        q[..., IDS] = full[k][..., IDS].softmax(-1)
        expected = torch.minimum(p[:, k - 1 :], q[:, : q.shape[1] - k + 1]).sum(-1)
        where = teachers[k - 1, :, : expected.shape[1]]
        torch.testing.assert_close(losses.overlaps[k - 1, :, : expected.shape[1]][where], expected[where])
        assert torch.equal(losses.predictions[k - 1], full[k].argmax(-1))
    metrics = OffsetMetrics(4)
    metrics.update(targets, losses)
    figures = metrics.compute()
    for k in range(1, 5):
        wanted = targets[k - 1][targets[k - 1] != IGNORE]
        inside = torch.isin(wanted, torch.tensor(IDS)) | torch.tensor(k == 1)
        logits = full[k][targets[k - 1] != IGNORE]
        assert figures[f"loss_{k}"] == pytest.approx(float(F.cross_entropy(logits[inside], wanted[inside])))
        if k > 1:
            assert figures[f"outside_draft_vocabulary_{k}"] == pytest.approx(1 - float(inside.double().mean()))
    counts = prepare_batch({"tokens": tokens, "documents": documents, "loss_mask": mask}, recipe, step=None).counts
    scored = [int(((targets[k] != IGNORE) & (torch.isin(targets[k], torch.tensor(IDS)))).sum()) for k in range(4)]
    assert counts.targets.tolist() == [int((targets[0] != IGNORE).sum()), *scored[1:]]


def drafting_model(kind, num_offsets=4):
    heads = HEAD_KINDS[kind] | {"num_offsets": num_offsets}
    return tiny_model(recipe_of(heads, {})).requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK[::2] else pytest.param(kind, marks=pytest.mark.slow) for kind in HEAD_KINDS]
)
def test_no_decoder_changes_the_text(kind):
    model = drafting_model(kind)
    expected = plain_texts(model, PROMPTS)
    assert any(token not in IDS for text in expected for token in text), "nothing here that cannot be drafted"
    tree = Tree((0, 0, 1, 1, 2), (0, 1, 0, 5, 0))
    for decoder in applicable_decoders(model):
        for draft_length in (None, "adaptive") if decoder in ("blockwise", "chain") else (None,):
            made = generate(
                model,
                PROMPTS,
                decoder=decoder,
                draft_length=draft_length,
                tree=tree if decoder == "tree" else None,
                max_new_tokens=LENGTH,
            )
            assert made.tokens == expected, decoder
            assert made.statistics.is_consistent
            if decoder in ("blockwise", "chain") and draft_length is None:
                assert made.statistics.num_accepted_tokens > 0


@pytest.mark.parametrize("kind", QUICK)
def test_drafts_are_the_restricted_argmax(kind):
    """Each is what the first choice among all V would be if the others scored minus infinity."""
    model = drafting_model(kind)
    draft = draft_chain if model.heads.reads_tokens else draft_blockwise
    session = begun_session(model, PROMPTS)
    found = draft(session, 3, lambda scores: (scores.argmax(-1), None)).tokens.tolist()
    assert {token for row in found for token in row} <= {*IDS}
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, int(session.tokens[row, len(prompt)])]
        for k in range(2, 5):
            scores = full_logits(model, [*text, *found[row][: k - 2]])[k][len(prompt) - 1]
            assert found[row][k - 2] == max(IDS, key=lambda token: float(scores[token]))


@pytest.mark.parametrize("kind", ["parallel", "medusa_replicated", "linear"])
def test_a_tree_of_first_choices_is_a_chain(kind):
    model = drafting_model(kind)
    chain = generate(model, PROMPTS, max_new_tokens=LENGTH, decoder="blockwise")
    tree = generate(model, PROMPTS, max_new_tokens=LENGTH, decoder="tree", tree=Tree((0, 1, 2), (0, 0, 0)))
    assert tree.statistics.accepted_by_row == chain.statistics.accepted_by_row
    assert tree.statistics.num_accepted_tokens > 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("medusa", {"decoder": "blockwise"}, marks=pytest.mark.slow),
        pytest.param("parallel", {"decoder": "blockwise", "sample_drafts": True}, marks=pytest.mark.slow),
        ("sequential", {"decoder": "chain", "sample_drafts": True}),
        pytest.param("causal", {"decoder": "chain", "top_p": 0.8, "sample_drafts": True}, marks=pytest.mark.slow),
        pytest.param("linear", {"decoder": "tree", "tree": Tree((0, 0, 1), (0, 1, 0))}, marks=pytest.mark.slow),
    ],
)
def test_sampled_texts_keep_the_law(kind, options):
    """q is 0 outside the draft vocabulary: what is drawn there comes out of what is left of p."""
    model = {"vocab_size": 4, "initializer_range": 0.25}
    heads = HEAD_KINDS[kind]
    recipe = with_draft_ids(tiny_recipe(heads=heads | {"draft_vocabulary": 2}, model=model), [0, 3])
    made_of = tiny_model(recipe).requires_grad_(requires_grad=False)
    chosen = {"temperature": 1.2} | ({"top_p": options["top_p"]} if "top_p" in options else {})
    made = generate(made_of, [PROMPT] * ROWS, max_new_tokens=NEW_TOKENS, **(chosen | options))
    assert abs(deviation(made.tokens, exact_law(made_of, Sampling(**chosen)))) < 5
    assert 0 < made.statistics.num_accepted_tokens < made.statistics.num_draft_tokens


def test_a_tree_wider_than_the_draft_vocabulary_is_refused():
    with pytest.raises(DecodingError, match="ranks in a tree must lie in 0 to 5"):
        generate(drafting_model("medusa"), PROMPTS, decoder="tree", tree=Tree((0,), (6,)))


def test_copied_rows_follow_a_frozen_matrix():
    """The copy that is kept where the matrix is frozen is made again when its values change."""
    model = drafting_model("medusa")
    matrix = model.unembedding.lm_heads[0].weight
    kept = model.unembedding.draft_rows(0)
    assert model.unembedding.draft_rows(0) is kept
    with torch.no_grad():
        matrix.mul_(2)
    assert torch.equal(model.unembedding.draft_rows(0), matrix[IDS])
