"""Distillation of the main head into the other offsets, a chunk of positions at a time [MTP-D, arXiv 2603.23911]."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.losses.divergences import divergence_pair
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.recipe.schema.objective import DistillSection


class LogitGrad(NamedTuple):
    """Gradient with respect to the logits of the entries that were compared, in the first m rows of a chunk."""

    entries: Tensor | None  # (m, K) which entries; None for all
    values: Tensor  # (m, K)

    def add_to(self, logits: Tensor, weight: Tensor) -> None:
        """Add the gradient, multiplied by a 0-dimensional weight, to that of all logits, (C, V)."""
        part, values = logits[: len(self.values)], self.values.mul_(weight)
        if self.entries is None:
            part.add_(values)
        else:
            part.scatter_add_(1, self.entries, values)


@dataclass
class Drafted:
    """Rows whose teacher's own choice is in the draft vocabulary; found out once for all offsets of a micro-batch."""

    rows: Tensor | None = None  # (P,)


@dataclass
class Distillation:
    """The part of a term that compares an offset with its teacher, the main head some rows further on."""

    section: DistillSection
    shift: int  # rows from a position to the one where the main head predicts the same token, k-1
    has_teacher: Tensor  # (P,)
    weight: Tensor  # 0-dimensional: divergences count this much in units of the term's coefficient
    matrix: int = 0  # number of the teacher's V x D matrix
    loss_sum: Tensor | float = 0.0
    row_losses: Tensor | None = None  # (P,) filled in where given
    learns: Tensor | None = None  # (P,) rows that have a loss and a gradient, None for all; others are measured alone
    measured_sum: Tensor | float = 0.0  # of all rows with a teacher
    drafted: Drafted | None = None  # rows of the teacher that count, where both sides score a draft vocabulary
    columns: Tensor | None = None  # (V',) ids that the student scores, where the teacher scores all V

    def teacher_rows(self, rows: slice) -> slice:
        """Rows of the main head that teach a chunk; fewer at the end."""
        num_rows = len(self.has_teacher)
        return slice(min(rows.start + self.shift, num_rows), min(rows.stop + self.shift, num_rows))

    def kept(self, vocab_size: int) -> int:
        """Number K of entries that are compared."""
        return self.section.resolved_top_k(vocab_size)

    def compare(
        self, teacher: Tensor, student: Tensor, rows: slice, *, both: bool
    ) -> tuple[LogitGrad, LogitGrad | None]:
        """Compare a chunk's logits: teacher (m, V) with the first m rows of student (C, V), neither changed.

        A student of V' entries beside a teacher of V gives the others no probability.

        Returns:
            Gradients with respect to the student's logits and, if `both`, the teacher's.
        """
        section, student = self.section, student[: len(teacher)]
        if self.columns is not None:
            student = torch.full_like(teacher, -torch.inf).index_copy_(1, self.columns, student)
        index = None
        kept, vocab_size = self.kept(teacher.shape[1]), teacher.shape[1]
        if kept < vocab_size:
            teacher, index = teacher.topk(kept, dim=1, sorted=False)  # (m, K)
            student = student.gather(1, index)
        log_p, log_q = (_tempered(logits, section.temperature).log_softmax(1) for logits in (teacher, student))
        counts = self.has_teacher[rows][: len(teacher)]
        if self.drafted is not None and self.drafted.rows is not None:
            counts = counts & self.drafted.rows[self.teacher_rows(rows)]
        if section.where == "confident":
            counts = counts & (log_p.amax(1) >= math.log(section.confidence))
        divergence, mirrored = divergence_pair(section.divergence, section.lk_rate)
        losses, grad = divergence(log_p, log_q)
        losses = torch.where(counts, losses, 0)
        self.measured_sum = self.measured_sum + losses.sum()
        if self.learns is not None:
            counts = counts & self.learns[rows][: len(teacher)]
            losses = torch.where(counts, losses, 0)
        self._record(losses, rows)
        back = _counted(mirrored(log_q, log_p)[1], counts, section) if both else None
        grad = grad if self.columns is None else grad[:, self.columns]
        own = LogitGrad(index, _counted(grad, counts, section))
        return own, None if back is None else LogitGrad(index, back)

    def _record(self, losses: Tensor, rows: slice) -> None:
        self.loss_sum = self.loss_sum + losses.sum()
        if self.row_losses is not None:
            self.row_losses[rows][: len(losses)] = losses


def _counted(grad: Tensor, counts: Tensor, section: DistillSection) -> Tensor:
    return _tempered(torch.where(counts[:, None], grad, 0), section.temperature)


def _tempered(values: Tensor, temperature: float) -> Tensor:
    return values if temperature == 1 else values / temperature


def teacher_positions(targets: Tensor) -> Tensor:
    """Tell where each offset has a teacher: (N, B, T) targets -> (N, B, T).

    That is where it has a target and the main head's position t+k-1 lies within the window; it is then of the same
    document. The main head, offset 1, has none.
    """
    has_teacher = targets != IGNORE
    has_teacher[0] = False
    for shift in range(1, len(targets)):
        has_teacher[shift, :, -shift:] = False
    return has_teacher
