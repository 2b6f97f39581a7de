"""Every divergence and its gradients on both sides, against the definition and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_lightning.losses import reference
from mtp_lightning.losses.chunked import Term, chunk_rows, chunked_loss
from mtp_lightning.losses.distillation import Distillation, teacher_positions
from mtp_lightning.losses.row_losses import CrossEntropy
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.recipe.schema.objective import DistillSection

KINDS = ("forward_kl", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda")
P, D, V = 11, 5, 9


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(P, D, generator=generator, dtype=torch.float64) for _ in range(2))
    matrix = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (P,), generator=generator)
    targets[::4] = IGNORE
    has_teacher = (targets != IGNORE) & (torch.rand(P, generator=generator) < 0.8)
    has_teacher[-2:] = False
    return hidden.requires_grad_(), teacher.requires_grad_(), matrix.requires_grad_(), targets, has_teacher


def lean(section, case, *, chunk_bytes, detached, share=0.7, weight=1.3):
    hidden, teacher, matrix, targets, has_teacher = case
    score = CrossEntropy(targets, smoothing=0.0, z_loss=0.0, predicts=False)
    distillation = Distillation(section, 2, has_teacher, torch.tensor(weight, dtype=torch.float64))
    term = Term(0, score, torch.tensor(0.5, dtype=torch.float64), share=share, distillation=distillation)
    teacher = teacher.detach() if detached else teacher
    loss = chunked_loss(
        [hidden], {0: matrix}, [term], chunk_bytes=chunk_bytes, teacher=teacher, teacher_learns=not detached
    )
    return loss, distillation


def plain(section, case, *, detached, share=0.7, weight=1.3):
    """The definition, row by row on full logits."""
    hidden, teacher, matrix, targets, has_teacher = case
    student = hidden @ matrix.T
    taught = (teacher @ matrix.T).roll(-2, 0)
    taught = taught.detach() if detached else taught
    divergences = reference.distillation(taught, student, section) * has_teacher
    return 0.5 * (share * reference.cross_entropy(student, targets, 0, 0).sum() + weight * divergences.sum())


@given(
    kind=st.sampled_from(KINDS),
    chunk_bytes=st.integers(1, 5000),
    top_k=st.sampled_from([1, 2, 4, V]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    where=st.sampled_from(["all", "confident"]),
    detached=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_chunked_distillation_is_the_definition(kind, chunk_bytes, top_k, temperature, where, detached, seed):
    section = DistillSection(
        divergence=kind, top_k=top_k, temperature=temperature, where=where, lk_rate=2.0, confidence=0.6
    )
    case = tensors(seed)
    hidden, teacher, matrix, *_ = case
    loss, _ = lean(section, case, chunk_bytes=chunk_bytes, detached=detached)
    expected = plain(section, case, detached=detached)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    inputs = [hidden, matrix] if detached else [hidden, matrix, teacher]
    found, wanted = (torch.autograd.grad(-2.5 * value, inputs) for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_sides_stay_finite(kind):
    hidden, teacher, matrix, targets, has_teacher = tensors()
    case = hidden * 1e3, teacher * -1e3, matrix, targets, has_teacher
    loss, _ = lean(DistillSection(divergence=kind), case, chunk_bytes=300, detached=False)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, [hidden, teacher, matrix]))


def test_a_frozen_student_still_teaches_back():
    hidden, teacher, matrix, *rest = tensors()
    case = hidden.detach(), teacher, matrix.detach(), *rest
    section = DistillSection()
    loss, _ = lean(section, case, chunk_bytes=300, detached=False)
    expected = plain(section, case, detached=False)
    torch.testing.assert_close(*(torch.autograd.grad(x, teacher) for x in (loss, expected)), rtol=1e-9, atol=1e-12)


def test_a_teacher_lies_in_the_window_and_the_document_of_what_it_teaches():
    generator = torch.Generator().manual_seed(3)
    num_offsets, num_positions = 4, 9
    tokens = torch.randint(5, (3, num_positions + num_offsets), generator=generator)
    documents = (torch.rand(tokens.shape, generator=generator) < 0.2).cumsum(1)
    mask = torch.rand(tokens.shape, generator=generator) < 0.7
    found = teacher_positions(shifted_targets(tokens, documents, num_offsets, mask))
    for k in range(1, num_offsets + 1):
        for row in range(3):
            for t in range(num_positions):
                teacher = t + k - 1
                expected = (
                    k > 1
                    and teacher < num_positions
                    and bool(mask[row, t + k])
                    and documents[row, t] == documents[row, teacher] == documents[row, t + k]
                )
                assert bool(found[k - 1, row, t]) == expected
    assert 10 < found.sum() < 50


def test_chunks_with_a_teacher_keep_to_the_budget():
    section, has_teacher = DistillSection(), torch.zeros(2048, dtype=torch.bool)
    distillation = Distillation(section, 1, has_teacher, torch.tensor(1.0))
    rows = chunk_rows(2048, 32000, torch.float32, 64 * 2**20, distillation)
    assert rows * (2 * 32000 + 10 * 10_000) * 4 <= 64 * 2**20
    assert rows >= 80
