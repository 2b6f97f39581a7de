"""Law 4: distillation is zero where student = teacher, nothing reaches the teacher. Law 1 holds with it on."""

import pytest
import torch
from torch.nn import functional as F

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.recipe.draft_vocabulary import with_draft_ids
from tests.laws.test_schedules_agree import MODELS, WEIGHTS, assert_same_step
from tests.support.covering import every_pair
from tests.support.runs import ROOT, mtp
from tests.support.tiny import HEAD_KINDS, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows

STAGES = ("zero1", "zero2", "zero3")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda")
WHERE = {"everywhere": {"top_k": 5}, "where confident": {"where": "confident", "confidence": 0.3, "top_k": 4}}
OTHER_LOSSES = {
    "none": {},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "token_order": {"weight": 0.7, "window_size": 6}},
}
SOFT_TARGETS = {"alpha": [0.0], "beta": [1.0], "top_k": "all"}
ONLY_DIVERGENCE = {"alpha": [0.0], "beta": [0.8]}


def distill(**fields):
    return {"distill": fields}


@every_pair(
    lambda *, kind, model, isolated, **_: (
        (model, kind[-10:]) != ("tied", "replicated") and not (isolated and kind == "anticausal")
    ),
    kind=HEAD_KINDS,
    detached=[True, False],
    where=WHERE,
    model=MODELS,
    attention=["window", "document"],
    accumulation=[1, 3],
    chunk_rows=[1, 7, 1000],
    masked=[False, True],
    isolated=[False, True],
)
def test_schedules_agree_for_every_kind(
    kind, detached, where, model, attention, accumulation, chunk_rows, masked, isolated
):
    shape = {"attention": attention, "accumulation": accumulation, "chunk_rows": chunk_rows, "masked": masked}
    objective = distill(**WHERE[where], alpha=[0.6], beta=[0.9, 0.4, 0.2], detach_teacher=detached)
    heads = HEAD_KINDS[kind] | ({"detach_trunk": True} if isolated else {})
    assert_same_step(heads, objective, model=MODELS[model], **shape)


@every_pair(
    divergence=DIVERGENCES,
    detached=[True, False],
    kind=["causal", "sequential"],
    beta=[(1.0,), (0.5, 0.0, 0.3)],
    weights=["equal", "two of four", "falling"],
    losses=OTHER_LOSSES,
)
def test_schedules_agree_for_every_divergence(divergence, detached, kind, beta, weights, losses):
    fields = {"divergence": divergence, "temperature": 1.7, "detach_teacher": detached, "beta": list(beta)}
    assert_same_step(HEAD_KINDS[kind], distill(**fields) | OTHER_LOSSES[losses], weights=WEIGHTS[weights])


def step(heads, objective, *, backward_order="sequential", model_fields=None, prepare=None, weights=None):
    """Losses and gradients of one step of a tiny model in which every position has a teacher, the last ones apart."""
    recipe = tiny_recipe(
        heads=heads, objective={"backward_order": backward_order} | objective, model=model_fields or {}
    )
    model = tiny_model(recipe)
    if prepare is not None:
        prepare(model)
    tokens, documents, _ = tiny_rows(recipe, 2)
    return gradients_of(model, recipe, (tokens, torch.zeros_like(documents), None), weights)


@torch.no_grad()
def make_constant(model):
    """Let every offset give the same distribution everywhere: no layer writes anything, no token differs."""
    model.trunk.embed_tokens.weight.copy_(
        model.trunk.embed_tokens.weight[:1].expand_as(model.trunk.embed_tokens.weight)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()


@every_pair(
    kind=["parallel", "causal", "anticausal"],
    divergence=DIVERGENCES,
    detached=[True, False],
    backward_order=["sequential", "bridged"],
)
def test_zero_and_without_gradient_where_student_is_teacher(kind, divergence, detached, backward_order):
    """Alpha 0: the gradients with distillation on are those of the main head's loss alone."""
    fields = ONLY_DIVERGENCE | {"divergence": divergence, "detach_teacher": detached}
    losses, gradients = step(HEAD_KINDS[kind], distill(**fields), backward_order=backward_order, prepare=make_constant)
    _, alone = step(
        HEAD_KINDS[kind], {}, backward_order=backward_order, prepare=make_constant, weights=[1.0, 0.0, 0.0, 0.0]
    )
    torch.testing.assert_close(losses[0].divergence_sums[1:], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-13)
    for name, gradient in gradients.items():
        expected = alone.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13, msg=name)


def test_the_constant_model_is_a_test_of_something():
    losses, _ = step(HEAD_KINDS["parallel"], distill(**ONLY_DIVERGENCE))
    assert losses[0].divergence_sums[1:].min() > 1


@pytest.mark.parametrize("kind", ["parallel_replicated", "medusa_replicated"])
@pytest.mark.parametrize("backward_order", ["sequential", "bridged", "joint"])
def test_nothing_reaches_a_teacher_of_its_own(kind, backward_order):
    """Block, matrix and (parallel) norm of the main head have the gradient of their own loss, to the last bit."""
    fields = ONLY_DIVERGENCE | {"top_k": 5}
    _, gradients = step(HEAD_KINDS[kind], distill(**fields), backward_order=backward_order)
    _, alone = step(HEAD_KINDS[kind], {}, backward_order=backward_order, weights=[1.0, 0.0, 0.0, 0.0])
    own = [name for name in alone if name.startswith(("heads.blocks.0.0.self", "unembedding.lm_heads.0"))]
    own = own if kind.startswith("parallel") else ["unembedding.lm_heads.0.weight"]
    assert own
    for name in own:
        assert torch.equal(gradients[name], alone[name]), name
    assert not torch.equal(
        gradients["unembedding.lm_heads.1.weight"], torch.zeros_like(gradients["unembedding.lm_heads.1.weight"])
    )


@pytest.mark.parametrize("backward_order", ["sequential", "bridged", "joint"])
@pytest.mark.parametrize("tied", [False, True])
def test_through_a_shared_matrix_only_the_students_use_gets_gradient(backward_order, tied):
    """Compare with the same step on frozen copies of the teacher's logits, which nothing can reach."""
    recipe = tiny_recipe(
        heads=HEAD_KINDS["sequential"] | {"detach_trunk": True},
        objective={"backward_order": backward_order} | distill(**ONLY_DIVERGENCE, top_k=6),
        model={"tie_word_embeddings": tied},
    )
    model, (tokens, documents, _) = tiny_model(recipe), tiny_rows(recipe, 2)
    documents = torch.zeros_like(documents)
    _, found = gradients_of(model, recipe, (tokens, documents, None))
    frozen, live = model.hidden_states(tokens, documents), model.hidden_states(tokens, documents)
    taught = model.unembedding.logits(1, frozen[1]).detach()
    num_positions = recipe.data.seq_len
    loss = torch.nn.functional.cross_entropy(
        model.unembedding.logits(1, live[1]).flatten(0, 1), tokens[:, 1 : num_positions + 1].flatten()
    )
    for k in range(2, 5):
        student = model.unembedding.logits(k, live[k])[:, : num_positions - k + 1]
        teacher = taught[:, k - 1 :]
        kept = teacher.topk(6).indices
        p, q = (logits.gather(2, kept).log_softmax(2) for logits in (teacher, student))
        loss = loss + 0.8 * (p.exp() * (p - q)).sum(2).mean()
    model.zero_grad()
    loss.backward()
    errors = {name: relative_error(found[name], p.grad) for name, p in model.named_parameters()}
    assert max(errors.values()) < 1e-10, errors


@every_pair(
    kind=HEAD_KINDS,
    backward_order=["sequential", "bridged", "joint"],
    model=["plain", "tied"],
    drafts=[None, 9],
    masked=[False, True],
)
def test_soft_targets_are_cross_entropy_with_the_teacher_as_target(kind, backward_order, model, drafts, masked):
    """As torch computes it from plain logits, of documents and a mask too; the last positions have no teacher."""
    recipe = tiny_recipe(
        heads=HEAD_KINDS[kind] | ({"draft_vocabulary": drafts} if drafts else {}),
        objective={"backward_order": backward_order} | distill(**SOFT_TARGETS),
        model={"tie_word_embeddings": model == "tied" and not kind.endswith("replicated")},
    )
    recipe = with_draft_ids(recipe, list(range(drafts))) if drafts else recipe
    net, (tokens, documents, mask) = tiny_model(recipe), tiny_rows(recipe, 2)
    rows = (tokens, documents, mask if masked else None)
    _, found = gradients_of(net, recipe, rows)
    hidden, targets = net.hidden_states(tokens, documents), shifted_targets(*rows[:2], 4, rows[2])
    main = net.unembedding.logits(1, hidden[1])
    loss = F.cross_entropy(main.flatten(0, 1), targets[0].flatten())
    for k in range(2, 5):
        students = net.unembedding.logits(k, hidden[k])[:, : 1 - k]
        teachers = main[:, k - 1 :].detach()
        spoken = teachers.argmax(-1) < (drafts or main.shape[-1])  # of the drafts; the others' loss is 0
        softened = teachers[..., :drafts].softmax(-1)
        losses = F.cross_entropy(students[..., :drafts].flatten(0, 1), softened.flatten(0, 1), reduction="none")
        has_target = (targets[k - 1, :, : 1 - k] != IGNORE).flatten()
        loss = loss + (losses * (has_target & spoken.flatten())).sum() / has_target.sum()
    net.zero_grad()
    loss.backward()
    errors = {name: relative_error(found[name], p.grad) for name, p in net.named_parameters() if p.grad is not None}
    assert max(errors.values()) < 1e-10, errors


def test_soft_targets_are_of_the_whole_vocabulary():
    section = tiny_recipe(objective=distill(**SOFT_TARGETS)).objective.distill
    assert section.resolved_top_k(50_257) == 50_257


def low_precision_step(backward_order, kind, fields, *, autocast=True):
    recipe = tiny_recipe(heads=HEAD_KINDS[kind], objective={"backward_order": backward_order} | distill(**fields))
    tokens, documents, _ = tiny_rows(recipe, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, gradients = gradients_of(tiny_model(recipe, torch.float32), recipe, (tokens, documents, None))
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("kind", ["sequential", "parallel_replicated"])
@pytest.mark.parametrize("detached", [True, False])
def test_bf16_is_within_the_noise_of_joint_bf16(kind, detached):
    """Slopes of cross-entropy and divergence share one product, and both keep their size."""
    fields = {"top_k": 6, "beta": [2.0], "detach_teacher": detached}
    joint = low_precision_step("joint", kind, fields)
    noise = relative_error(joint, low_precision_step("joint", kind, fields, autocast=False))
    for backward_order in ("sequential", "bridged"):
        assert 0 < relative_error(low_precision_step(backward_order, kind, fields), joint) < 2 * noise


RUN = (
    "run.steps=4",
    "run.validate_every_steps=4",
    "checkpoint.every_steps=4",
    "logging.every_steps=1",
    "run.threads=1",
    "run.device=cpu",
    "run.cache=cache",
    "batch.micro_batch_size=2",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ("detach_teacher: true, top_k: 100", STAGES),
        ("detach_teacher: false", STAGES),
        ("alpha: [0.0], top_k: all", ("zero3",)),
    ],
)
def test_training_on_two_ranks_is_that_on_one(tmp_path, fields, stages):
    """Every stage of ZeRO, with a matrix for each offset: the teacher's is used by ranks that must not wait for it."""
    recipe = str(ROOT / "recipes/debug/chained_causal.yaml")
    own = (*RUN, f"objective.distill={{{fields}, beta: [1.0]}}", "heads.unembedding=replicated")
    strategies = {"single": (), **{stage: (f"strategy.kind={stage}", "strategy.ranks_per_node=2") for stage in stages}}
    weights = {}
    for name, spread in strategies.items():
        done = mtp("train", recipe, *own, *spread, f"run.dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        weights[name] = dict(load_model(tmp_path / name)[1].named_parameters())
    for stage in stages:
        for name, value in weights["single"].items():
            torch.testing.assert_close(weights[stage][name], value, rtol=1e-3, atol=2e-4, msg=f"{stage} {name}")
