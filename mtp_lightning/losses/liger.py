"""Cross-entropy of a linear layer by Liger Kernel (github.com/linkedin/Liger-Kernel), one fused pass over the scores.

The only place that imports `liger_kernel`. Its kernels are Triton: they run on a GPU, or slowly on a CPU where
TRITON_INTERPRET=1 is set before they are imported.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from mtp_lightning.errors import TrainingError
from mtp_lightning.losses.targets import IGNORE

INSTALL = "pip install 'mtp_lightning[liger]' (or liger-kernel>=0.8.5,<0.9)"


@dataclass(frozen=True, kw_only=True)
class FusedLoss:
    """Sums over rows and gradients of the loss sum; a gradient is None where none was asked for."""

    loss_sum: Tensor  # 0-dimensional, with smoothing and z-loss
    nll_sum: Tensor  # 0-dimensional, sum of -log p(target)
    predictions: Tensor | None  # (P,) -1 for ignored rows
    hidden_grad: Tensor | None  # (P, D) in the type of the hidden states
    matrix_grad: Tensor | None  # (V, D) fp32
    bias_grad: Tensor | None  # (V,) fp32


def check_liger(device: torch.device) -> None:
    """Refuse a run whose losses cannot be computed, before it begins.

    Raises:
        TrainingError: Liger Kernel is not installed, or the device is not one that its kernels run on.
    """
    lacking = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    if lacking:
        raise TrainingError(
            "memory.loss_kernel=liger needs Liger Kernel and Triton",
            f"no package {' and no package '.join(lacking)}",
            f"{INSTALL}, or set memory.loss_kernel=own.",
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise TrainingError(
            "memory.loss_kernel=liger needs a GPU for its Triton kernels",
            f"device {device.type}",
            "Set memory.loss_kernel=own; for a try at a small size set TRITON_INTERPRET=1, which is slow.",
        )


def liger_loss(
    hidden: Tensor,
    matrix: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    cap: float | None = None,
    predicts: bool = False,
    wants: tuple[bool, bool],
    chunk_bytes: int,
) -> FusedLoss:
    """Compute cross-entropies of all rows: (P, D) hidden, (V, D) matrix and (P,) targets of one type and device.

    Args:
        bias: (V,) what is added to the scores.
        cap: Scores become cap x tanh(scores / cap).
        predicts: Also take the best-scored entry of every row that has a target.
        wants: Whether the hidden states, and whether matrix and bias, want a gradient.
        chunk_bytes: Memory that scores may take at once; Liger's own least, P x D entries, where that is more.

    Raises:
        TrainingError: Labels are smoothed over scores that are capped.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    if smoothing and cap is not None:
        raise TrainingError(
            "objective.label_smoothing must be 0 for scores that the model caps, with memory.loss_kernel=liger",
            f"{smoothing}, and a cap of {cap}",
            "Set objective.label_smoothing=0 or memory.loss_kernel=own.",
        )
    loss_sum, z_losses, _, predictions, hidden_grad, matrix_grad, bias_grad = fused_linear_cross_entropy_forward(
        hidden,
        matrix,
        targets,
        bias=bias,
        ignore_index=IGNORE,
        lse_square_scale=z_loss,
        label_smoothing=smoothing,
        reduction="sum",
        softcap=cap,
        return_z_loss=bool(z_loss),
        accum_dtype=torch.float32,
        return_predicted_tokens=predicts,
        compute_gradients=any(wants),
        weight_requires_grad=wants[1],
        chunk_mem_const=_chunk_factor(hidden, matrix, chunk_bytes),
    )
    nll_sum = loss_sum if not z_loss else loss_sum - z_losses.float().sum()
    if smoothing:
        nll_sum = nll_sum - smoothing * _picked_over_mean(hidden, matrix, bias, targets)
    return FusedLoss(
        loss_sum=loss_sum,
        nll_sum=nll_sum,
        predictions=predictions,
        hidden_grad=hidden_grad if wants[0] else None,
        matrix_grad=matrix_grad if wants[1] else None,
        bias_grad=bias_grad if wants[1] else None,
    )


def _chunk_factor(hidden: Tensor, matrix: Tensor, chunk_bytes: int) -> int:
    """Return the multiple of P x D entries with which Liger has the most rows, a power of two, in so many bytes.

    Its least, one, reads a large matrix once per few rows: 512 of them for V = 128k, D = 1,024 and 32,768 positions.
    """
    (num_rows, width), vocab_size = hidden.shape, len(matrix)
    most = max(1, chunk_bytes // (vocab_size * hidden.element_size()))
    rows = min(1 << (most.bit_length() - 1), num_rows)
    num_chunks = -(-num_rows // rows)
    return max(1, vocab_size // (num_chunks * width))


def _picked_over_mean(hidden: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum, over rows with a target, the target's score less the mean of all, which smoothing has added to the loss."""
    is_valid = targets != IGNORE
    index = targets.clamp(min=0)
    direction = matrix[index].float() - matrix.float().mean(0)  # (P, D)
    over = (hidden.float() * direction).sum(1)
    if bias is not None:
        over = over + bias.float()[index] - bias.float().mean()
    return torch.where(is_valid, over, 0).sum()
