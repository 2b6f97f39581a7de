"""Linear layer and loss in one, in chunks of positions: no (T, V) tensor ever exists.

The gradients are computed during the forward pass, chunk by chunk, and handed out by the backward pass: three
V x D products per position, as many as any exact method needs, and memory for one chunk of logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.losses.scores import Score

Grad = Tensor | None  # buffer of a gradient, where one is wanted


@dataclass
class Term:
    """One hidden state's share of a loss: which matrix scores it, how, and what its sum is multiplied by."""

    matrix: int  # number of the V x D matrix
    score: Score
    coefficient: Tensor  # 0-dimensional
    count: Tensor | None = None  # rows that count; given, the term is balanced against the first by its RMS
    loss_sum: Tensor | float = 0.0
    square_sum: Tensor | float = 0.0

    def rms(self) -> Tensor:
        """Root mean square of the row losses."""
        assert self.count is not None
        return torch.sqrt(torch.as_tensor(self.square_sum) / self.count.clamp(min=1))


def chunked_loss(
    hiddens: Sequence[Tensor],
    matrices: Mapping[int, Tensor],
    terms: Sequence[Term],
    *,
    chunk_bytes: int,
    balance_to: Tensor | None = None,
) -> Tensor:
    """Compute sum over terms of coefficient x loss sum, as one autograd node.

    Args:
        hiddens: (P, D) normed hidden states, one per term.
        matrices: (V, D) unembedding matrices by the number that terms name them by. Give those that are used: under
            autograd every one counts as touched, and engines wait for its gradient.
        terms: What to compute; their sums are filled in.
        chunk_bytes: Memory that the logits of one chunk may take.
        balance_to: RMS that balanced terms are scaled to; None means the first term's own.

    Returns:
        The weighted total, 0-dimensional. Gradients reach `hiddens` and `matrices` only; the scale of the
        incoming gradient is honoured. The node can be walked backward once.
    """
    numbers = list(matrices)
    plan = _Plan(terms, numbers, chunk_bytes, balance_to, wants_gradients=torch.is_grad_enabled())
    total: Tensor = _ChunkedLoss.apply(plan, *matrices.values(), *hiddens)  # type: ignore[no-untyped-call]
    return total


def chunk_rows(num_rows: int, vocabulary: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    """Rows per chunk within a byte budget, as even as possible; low precision keeps two extra copies."""
    exact = torch.promote_types(dtype, torch.float32)
    entry_bytes = exact.itemsize + (2 * dtype.itemsize if dtype != exact else 0)
    most = max(1, chunk_bytes // (vocabulary * entry_bytes))
    num_chunks = -(-num_rows // most)
    return -(-num_rows // num_chunks)


@dataclass
class _Plan:
    terms: Sequence[Term]
    numbers: list[int]  # of the matrices
    chunk_bytes: int
    balance_to: Tensor | None
    wants_gradients: bool  # inside the node grad mode is off, and inputs claim to need gradients even under no_grad


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensor:
        num_matrices = len(plan.numbers)
        matrices, hiddens = tensors[:num_matrices], tensors[num_matrices:]
        needs = [need and plan.wants_gradients for need in ctx.needs_input_grad[1:]]
        dtype = _compute_dtype(matrices[0])
        exact = torch.promote_types(dtype, torch.float32)
        cast = [matrix.to(dtype) for matrix in matrices]
        matrix_grads = [
            torch.zeros_like(matrix, dtype=exact) if need else None
            for matrix, need in zip(matrices, needs[:num_matrices], strict=True)
        ]
        hidden_grads = []
        total = torch.zeros((), dtype=exact, device=matrices[0].device)
        with torch.autocast(matrices[0].device.type, enabled=False):
            for index, (term, hidden) in enumerate(zip(plan.terms, hiddens, strict=True)):
                need, at = needs[num_matrices + index], plan.numbers.index(term.matrix)
                grad = torch.empty_like(hidden, dtype=_kept(hidden.dtype)) if need else None
                total += _run_term(plan, term, hidden.to(dtype), cast[at], (grad, matrix_grads[at]))
                hidden_grads.append(grad)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(
            *(g if g is None else g.to(_kept(m.dtype)) for g, m in zip(matrix_grads, matrices, strict=True)),
            *hidden_grads,
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(grad if grad is None else grad.mul_(scale).to(dtype) for grad, dtype in pairs)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """Type that a gradient waits in for its scale: without it, most of a half-precision gradient would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def _compute_dtype(matrix: Tensor) -> torch.dtype:
    device = matrix.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype


def _run_term(plan: _Plan, term: Term, hidden: Tensor, matrix: Tensor, grads: tuple[Grad, Grad]) -> Tensor:
    """Run one term: fill the gradient of `hidden`, add to that of `matrix`, return the weighted loss sum."""
    grad, into = grads
    if term.count is None:
        _run_chunks(plan, term, hidden, matrix, (grad, into, term.coefficient))
        return term.coefficient * term.loss_sum
    # Balanced: the factor is known only after the last chunk, so the matrix gradient waits in a buffer of its own.
    own = None if into is None else torch.zeros_like(into)
    _run_chunks(plan, term, hidden, matrix, (grad, own, torch.ones_like(term.coefficient)))
    if plan.balance_to is None:
        plan.balance_to = term.rms()
    factor = term.coefficient * plan.balance_to / term.rms()
    if grad is not None:
        grad.mul_(factor)
    if into is not None and own is not None:
        into.add_(own.mul_(factor))
    return factor * term.loss_sum


def _run_chunks(
    plan: _Plan, term: Term, hidden: Tensor, matrix: Tensor, outputs: tuple[Grad, Grad, Tensor]
) -> None:
    """Score one term chunk by chunk, gradients multiplied by the given coefficient."""
    grad, into, coefficient = outputs
    step = chunk_rows(len(hidden), len(matrix), matrix.dtype, plan.chunk_bytes)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        logits = (hidden[rows] @ matrix.T).to(torch.promote_types(matrix.dtype, torch.float32))  # (C, V)
        losses, factor = term.score(logits, rows)
        term.loss_sum = term.loss_sum + losses.sum()
        term.square_sum = term.square_sum + losses.square().sum()
        factor = (factor * coefficient)[:, None]  # (C, 1)
        slope = logits.to(matrix.dtype)
        if grad is not None:
            grad[rows] = (slope @ matrix) * factor  # (C, D)
        if into is not None:
            _add_product(into, slope, hidden[rows] * factor)
        del logits, slope  # else this chunk lives until the next one has been made


def _add_product(into: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """Add slope.T @ hidden, (C, V) and (C, D), to a (V, D) buffer that may be of higher precision."""
    if into.dtype == slope.dtype:
        into.addmm_(slope.T, hidden)
    else:
        into += slope.T @ hidden.to(slope.dtype)
