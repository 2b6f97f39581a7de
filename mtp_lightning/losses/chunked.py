"""Linear layer and loss in one, in chunks of positions: no (T, V) tensor ever exists.

The gradients are computed during the forward pass, chunk by chunk, and handed out by the backward pass: three
V x D products per position, as many as any exact method needs, and memory for one chunk of logits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.losses.distillation import Distillation, LogitGrad
from mtp_lightning.losses.liger import liger_loss
from mtp_lightning.losses.logit_map import LogitMap
from mtp_lightning.losses.row_losses import CrossEntropy, RowLoss
from mtp_lightning.losses.targets import IGNORE

Grad = Tensor | None  # buffer of a gradient, where one is wanted
HALF_RANGE = 2.0**15  # a value that fp16 holds with room to spare
DISTILLED_COPIES = 10  # tensors of the compared entries that distillation has in hand


@dataclass
class Term:
    """One hidden state's share of a loss: matrix, row loss, and what the sum is multiplied by."""

    matrix: int  # number of the V x D matrix
    row_loss: RowLoss
    coefficient: Tensor  # 0-dimensional
    count: Tensor | None = None  # rows that count; given, the term is balanced against the first by its RMS
    share: float = 1.0  # of the row loss beside a distillation
    distillation: Distillation | None = None
    loss_sum: Tensor | float = 0.0
    square_sum: Tensor | float = 0.0

    def total(self) -> Tensor:
        """Row loss and distillation together, without the coefficient."""
        distilled = 0.0 if self.distillation is None else self.distillation.weight * self.distillation.loss_sum
        return torch.as_tensor(self.share * self.loss_sum + distilled)

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
    teacher: Tensor | None = None,
    teacher_learns: bool = False,
    biases: Mapping[int, Tensor] | None = None,
    logit_maps: Mapping[int, LogitMap] | None = None,
) -> Tensor:
    """Compute sum over terms of coefficient x loss sum, as one autograd node.

    Args:
        hiddens: (P, D) normed hidden states, one per term.
        matrices: (V, D) unembedding matrices by the number that terms name them by. Give those that are used: under
            autograd every one counts as touched, and engines wait for its gradient.
        terms: What to compute; their sums are filled in.
        chunk_bytes: Memory that the logits of one chunk may take.
        balance_to: RMS that balanced terms are scaled to; None means the first term's own.
        teacher: (P, D) normed hidden states of the main head, which terms with a distillation are compared with.
        teacher_learns: Give them and the teacher's matrix, so far as they want one, a gradient from the comparison.
        biases: (V,) what is added to the scores by a matrix, of those that have one, by the same numbers.
        logit_maps: What is done to the scores by a matrix, of those where anything is.

    Returns:
        The weighted total, 0-dimensional. Gradients reach the given tensors only; the scale of the
        incoming gradient is honoured. The node can be walked backward once.
    """
    biases = biases or {}
    teachers = [] if teacher is None else [teacher]
    wants_gradients = torch.is_grad_enabled()
    plan = _Plan(
        terms, [*matrices], [*biases], logit_maps or {}, chunk_bytes, balance_to, wants_gradients, teacher_learns
    )
    inputs = (*matrices.values(), *biases.values(), *hiddens, *teachers)
    total: Tensor = _ChunkedLoss.apply(plan, *inputs)  # type: ignore[no-untyped-call]
    return total


def chunked_argmax(hidden: Tensor, matrix: Tensor, chunk_bytes: int, bias: Tensor | None = None) -> Tensor:
    """Find the best-scored entry of every row, in chunks: (P, D), (V, D), (V,) -> (P,). Nothing learns from it."""
    dtype = _compute_dtype(matrix)
    matrix, hidden = matrix.to(dtype), hidden.to(dtype)
    added = 0.0 if bias is None else bias.to(dtype)
    step = chunk_rows(len(hidden), len(matrix), dtype, chunk_bytes)
    with torch.autocast(matrix.device.type, enabled=False):
        return torch.cat([(rows @ matrix.T + added).argmax(1) for rows in torch.split(hidden, step)])


def chunk_rows(
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    chunk_bytes: int,
    distillation: Distillation | None = None,
    *,
    is_capped: bool = False,
) -> int:
    """Rows per chunk within a byte budget, as even as possible; low precision keeps two extra copies, a cap one.

    Distillation has the teacher's logits beside the student's, and some ten tensors of the entries it compares.
    """
    exact = torch.promote_types(dtype, torch.float32)
    entry_bytes = exact.itemsize + (2 * dtype.itemsize if dtype != exact else 0)
    row_bytes = vocab_size * (entry_bytes + (exact.itemsize if is_capped else 0))
    if distillation is not None:
        row_bytes = 2 * row_bytes + DISTILLED_COPIES * distillation.kept(vocab_size) * exact.itemsize
    most = max(1, chunk_bytes // row_bytes)
    num_chunks = -(-num_rows // most)
    return -(-num_rows // num_chunks)


@dataclass
class _Plan:
    terms: Sequence[Term]
    numbers: list[int]  # of the matrices
    biased: list[int]  # of those with a bias
    logit_maps: Mapping[int, LogitMap]
    chunk_bytes: int
    balance_to: Tensor | None
    wants_gradients: bool  # inside the node grad mode is off, and inputs claim to need gradients even under no_grad
    teacher_learns: bool


@dataclass
class _LinearOperand:
    """Both operands of hidden @ matrix.T in the type they are multiplied in, with buffers for their gradients.

    A bias is added to the product, and what comes out is mapped, where the model does so.
    """

    hidden: Tensor  # (P, D)
    matrix: Tensor  # (V, D)
    grad: Grad  # (P, D)
    matrix_grad: Grad  # (V, D)
    bias: Tensor | None = None  # (V,)
    bias_grad: Grad = None  # (V,)
    logit_map: LogitMap | None = None
    slope: Tensor | float = 1.0  # of the map, for the rows that were scored last

    @property
    def is_capped(self) -> bool:
        """Whether the slope of the map is a tensor of its own."""
        return self.logit_map is not None and self.logit_map.cap is not None

    @property
    def learns(self) -> bool:
        """Whether anything here wants a gradient."""
        return any(grad is not None for grad in (self.grad, self.matrix_grad, self.bias_grad))

    def logits(self, rows: slice) -> Tensor:
        """Score some rows in full precision: (C, V)."""
        scores = _exact_product(self.hidden[rows], self.matrix.T)
        if self.bias is not None:
            scores += self.bias
        if self.logit_map is not None:
            scores = self.logit_map(scores)
            self.slope = self.logit_map.slope_at(scores)
        return scores

    def add(self, logits_gradient: Tensor, rows: slice, factor: Tensor) -> None:
        """Hand on a gradient of the rows scored last, (C, V), multiplied by a factor for each or all, (C or 1, 1)."""
        if self.logit_map is not None:
            logits_gradient.mul_(self.slope)
        if self.bias_grad is not None:
            self.bias_grad += (logits_gradient * factor).sum(0)
        if self.matrix.dtype == torch.float16:
            factor = _shrink_to_half(logits_gradient, factor)
        grad = logits_gradient.to(self.matrix.dtype)
        if self.grad is not None:
            self.grad[rows] += (grad @ self.matrix) * factor  # (C, D)
        if self.matrix_grad is not None:
            _add_product(self.matrix_grad, grad, self.hidden[rows], factor)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensor:
        num_matrices, num_terms = len(plan.numbers), len(plan.terms)
        num_weights = num_matrices + len(plan.biased)
        matrices, biases, hiddens = tensors[:num_matrices], tensors[num_matrices:num_weights], tensors[num_weights:]
        needs = [need and plan.wants_gradients for need in ctx.needs_input_grad[1:]]
        dtype = _compute_dtype(matrices[0])
        exact = torch.promote_types(dtype, torch.float32)
        cast = {number: matrix.to(dtype) for number, matrix in zip(plan.numbers, matrices, strict=True)}
        matrix_grads = {
            number: torch.zeros_like(matrix, dtype=exact) if need else None
            for number, matrix, need in zip(plan.numbers, matrices, needs[:num_matrices], strict=True)
        }
        bias_of = dict(zip(plan.biased, biases, strict=True))
        bias_grads = {
            number: torch.zeros_like(bias, dtype=exact) if need else None
            for (number, bias), need in zip(bias_of.items(), needs[num_matrices:num_weights], strict=True)
        }
        hidden_grads: list[Grad] = [None] * len(hiddens)

        def operand(index: int, number: int) -> _LinearOperand:
            hidden, need = hiddens[index], needs[num_weights + index]
            hidden_grads[index] = torch.zeros_like(hidden, dtype=_kept(hidden.dtype)) if need else None
            extras = (bias_of.get(number), bias_grads.get(number), plan.logit_maps.get(number))
            return _LinearOperand(hidden.to(dtype), cast[number], hidden_grads[index], matrix_grads[number], *extras)

        total = torch.zeros((), dtype=exact, device=matrices[0].device)
        with torch.autocast(matrices[0].device.type, enabled=False):
            teacher = _teacher_operand(plan, operand) if len(hiddens) > num_terms else None
            for index, term in enumerate(plan.terms):
                total += _run_term(plan, term, operand(index, term.matrix), teacher)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        pairs = zip((*matrix_grads.values(), *bias_grads.values()), (*matrices, *biases), strict=True)
        kept = [grad if grad is None else grad.to(_kept(weight.dtype)) for grad, weight in pairs]
        ctx.save_for_backward(*kept, *hidden_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(grad if grad is None else grad.mul_(scale).to(dtype) for grad, dtype in pairs)


def _teacher_operand(plan: _Plan, operand: Callable[[int, int], _LinearOperand]) -> _LinearOperand:
    """The main head as a teacher: it gets no gradient unless it is to learn as well."""
    number = next(term.distillation.matrix for term in plan.terms if term.distillation is not None)
    teacher = operand(len(plan.terms), number)
    return teacher if plan.teacher_learns else replace(teacher, grad=None, matrix_grad=None, bias_grad=None)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """Type that a gradient waits in for its scale: without it, most of a half-precision gradient would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def _compute_dtype(matrix: Tensor) -> torch.dtype:
    device = matrix.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype


def _run_term(plan: _Plan, term: Term, operand: _LinearOperand, teacher: _LinearOperand | None) -> Tensor:
    """Run one term: fill the gradient of its hidden states, add to that of its matrix, return the weighted loss sum."""
    if isinstance(term.row_loss, CrossEntropy) and term.row_loss.kernel == "liger":
        _run_liger(plan, term, term.row_loss, operand)
        return term.coefficient * term.total()
    if term.count is None:
        _run_chunks(plan, term, operand, teacher, term.coefficient)
        return term.coefficient * term.total()
    # Balanced: the factor is known only after the last chunk, so the matrix gradient waits in a buffer of its own.
    into = [operand.matrix_grad, operand.bias_grad]
    own = [None if grad is None else torch.zeros_like(grad) for grad in into]
    waiting = replace(operand, matrix_grad=own[0], bias_grad=own[1])
    _run_chunks(plan, term, waiting, None, torch.ones_like(term.coefficient))
    if plan.balance_to is None:
        plan.balance_to = term.rms()
    own_rms = term.rms()  # 0 without a target here, as where a mask leaves little to learn
    factor = (term.coefficient * plan.balance_to / own_rms).where(own_rms > 0, 0.0)
    if operand.grad is not None:
        operand.grad.mul_(factor)
    for whole, part in zip(into, own, strict=True):
        if whole is not None and part is not None:
            whole.add_(part.mul_(factor))
    return factor * term.loss_sum


def _run_liger(plan: _Plan, term: Term, cross_entropy: CrossEntropy, operand: _LinearOperand) -> None:
    """Score one term in Liger's kernel; recipes that ask more of a loss than it knows are refused when they are read.

    It predicts nothing where there is no target; of these few rows the predictions are made here.
    """
    applied = operand.logit_map or LogitMap()
    hidden = operand.hidden if applied.scale == 1 else operand.hidden * applied.scale
    targets, predictions = cross_entropy.targets, cross_entropy.predictions
    found = liger_loss(
        hidden.contiguous(),
        operand.matrix,
        targets,
        bias=None if operand.bias is None else operand.bias.to(operand.matrix.dtype),
        smoothing=cross_entropy.smoothing,
        z_loss=cross_entropy.z_loss,
        cap=applied.cap,
        predicts=predictions is not None,
        wants=(operand.grad is not None, operand.matrix_grad is not None or operand.bias_grad is not None),
        chunk_bytes=plan.chunk_bytes,
    )
    term.loss_sum, cross_entropy.nll_sum = found.loss_sum, found.nll_sum
    if predictions is not None and found.predictions is not None:
        predictions.copy_(found.predictions)
        (others,) = (targets == IGNORE).nonzero(as_tuple=True)
        if len(others):
            predictions[others] = chunked_argmax(hidden[others], operand.matrix, plan.chunk_bytes, operand.bias)
    if operand.grad is not None and found.hidden_grad is not None:
        operand.grad.add_(found.hidden_grad * (applied.scale * term.coefficient))
    for into, part in ((operand.matrix_grad, found.matrix_grad), (operand.bias_grad, found.bias_grad)):
        if into is not None and part is not None:
            into.addcmul_(part, term.coefficient.to(part.dtype))


def _run_chunks(
    plan: _Plan, term: Term, operand: _LinearOperand, teacher: _LinearOperand | None, coefficient: Tensor
) -> None:
    """Score one term chunk by chunk, gradients multiplied by the given coefficient."""
    num_rows = len(operand.hidden)
    vocab_size = max(len(one.matrix) for one in (operand, teacher) if one is not None)
    kind, is_capped = operand.matrix.dtype, operand.is_capped
    step = chunk_rows(num_rows, vocab_size, kind, plan.chunk_bytes, term.distillation, is_capped=is_capped)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits = operand.logits(rows)  # (C, V)
        grad = None
        if term.distillation is not None and teacher is not None:
            grad = _distil(term.distillation, logits, teacher, rows, coefficient)
        # Where nothing is done to the gradient before the products, it may come rounded for them; fp16 needs its range
        is_final = grad is None and operand.logit_map is None and operand.matrix.dtype != torch.float16
        losses, factor, logits = term.row_loss(logits, rows, operand.matrix.dtype if is_final else logits.dtype)
        term.loss_sum = term.loss_sum + losses.sum()
        term.square_sum = term.square_sum + losses.square().sum()
        factor = factor[:, None]  # (C, 1)
        if grad is not None and term.distillation is not None:
            logits.mul_(factor * term.share)
            grad.add_to(logits, term.distillation.weight)
            factor = torch.ones_like(factor[:1])
        operand.add(logits, rows, factor * coefficient)
        del logits, grad  # else this chunk lives until the next one has been made


def _distil(
    distillation: Distillation, logits: Tensor, teacher: _LinearOperand, rows: slice, coefficient: Tensor
) -> LogitGrad:
    """Compare a chunk with its teacher; hand on the teacher's gradient, if it gets one, and return the student's."""
    there = distillation.teacher_rows(rows)
    teacher_logits = teacher.logits(there)  # (m, V)
    grad, back = distillation.compare(teacher_logits, logits, rows, both=teacher.learns)
    if back is not None:
        back.add_to(teacher_logits.zero_(), distillation.weight)
        teacher.add(teacher_logits, there, coefficient)
    return grad


def _add_product(into: Tensor, grad: Tensor, hidden: Tensor, factor: Tensor) -> None:
    """Add grad.T @ (hidden x factor), (C, V) and (C, D), to a (V, D) buffer that may be of higher precision.

    Factors of a large batch are too small for half precision: there the largest becomes 1 until after the product.
    """
    if into.dtype == grad.dtype:
        into.addmm_(grad.T, hidden * factor)
    elif grad.dtype == torch.float16:
        largest = factor.abs().amax().clamp(min=torch.finfo(factor.dtype).tiny)
        into.addcmul_(_exact_product(grad.T, (hidden * (factor / largest)).to(grad.dtype)), largest)
    elif into.is_cuda:
        torch.addmm(into, grad.T, (hidden * factor).to(grad.dtype), out_dtype=into.dtype, out=into)
    else:
        into += grad.T @ (hidden * factor).to(grad.dtype)


def _shrink_to_half(grad: Tensor, factor: Tensor) -> Tensor:
    """Bring rows of a gradient, (C, V), into fp16's range, in place; return the factors that make up for it.

    Before it is divided by its mass, a flat row has the size of the vocabulary, which may be beyond 65,504.
    """
    shrink = (HALF_RANGE / grad.abs().amax(1, keepdim=True)).clamp(max=1)
    grad.mul_(shrink)
    return factor / shrink


def _exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices of low precision into at least fp32; on a GPU without rounding the product in between."""
    exact = torch.promote_types(left.dtype, torch.float32)
    if left.is_cuda and left.dtype != exact:
        return torch.mm(left, right, out_dtype=exact)
    return (left @ right).to(exact)
