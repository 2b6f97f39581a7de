"""Linear maps for decoding in bfloat16 on CPU, their weights laid out once as oneDNN's kernels read them.

A step of a decoder has few positions, so it waits for the weights to be read: as many as there are verify at the cost
of one. Torch lays a weight out anew in every call, which costs as much again; its compiler packs them for inference, by
the same two operators. Kernels of this type give a position the same scores whatever stands beside it, but for one that
stands alone before a wide map.
"""

from typing import final

import torch
from torch import Tensor, nn

from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.unembedding import Unembedding

PACKED = ("cpu", torch.bfloat16)
WIDEST_ALONE = 1024
"""Wider sums of a row alone are added up in another order (oneDNN, AVX-512), so that drafts would change texts."""


@final
class PackedLinear(nn.Linear):
    """A linear map that is only applied: its weight has shape and type, but no values."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta", dtype=plain.weight.dtype)
        self.requires_grad_(requires_grad=False)
        self.bias = plain.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the map: (..., D) -> (..., E)."""
        is_alone = hidden.numel() == self.in_features > WIDEST_ALONE
        rows = hidden.reshape(1, -1).repeat(2, 1) if is_alone else hidden  # as fast: reading the weights takes the time
        output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return output[0].view(*hidden.shape[:-1], self.out_features) if is_alone else output


def draft_map(unembedding: Unembedding, index: int) -> nn.Linear:
    """Make the map that scores the draft vocabulary, D -> V', of a matrix: packed where the matrix is."""
    rows, bias = unembedding.draft_rows(index).detach(), unembedding.draft_bias(index)
    plain = nn.Linear(rows.shape[1], len(rows), bias=False, device="meta")
    plain.weight = nn.Parameter(rows, requires_grad=False)
    if bias is not None:
        plain.register_parameter("bias", nn.Parameter(bias.detach(), requires_grad=False))
    return PackedLinear(plain) if isinstance(unembedding.lm_heads[index], PackedLinear) else plain


def pack_linear_maps(model: MtpModel) -> MtpModel:
    """Pack the linear maps of a model that is only decoded with, in place, where that makes it faster; return it.

    On a GPU, in another type, or where the processor has no kernels for it, the model stays as it is.
    """
    if torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for owner in [*model.modules()]:
            for name, child in owner.named_children():
                if type(child) is nn.Linear and (child.weight.device.type, child.weight.dtype) == PACKED:
                    packed = PackedLinear(child)
                    if owner is model.unembedding.lm_heads and model.unembedding.drafts is not None:
                        packed.weight = child.weight  # rows of it score the drafts
                    setattr(owner, name, packed)
    return model
