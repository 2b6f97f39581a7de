"""Attention to kept keys is that of torch's plain kernel, whatever rows are put together for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.model.layers import Attention
from mtp_lightning.recipe import Recipe

CASES = [
    (heads, shared, positions, reach, is_masked, dtype)
    for heads, shared in ((6, 2), (4, 1), (3, 3))
    for positions, reach in ((1, 11), (2, 11), (5, 11), (1, 1), (5, 5))
    for is_masked in (True, False)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("heads", "shared", "positions", "reach", "is_masked", "dtype"), CASES)
def test_positions_attend_to_what_is_kept(
    heads: int, shared: int, positions: int, reach: int, is_masked: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, width = 3, 8
    attention = Attention(
        Recipe.model_validate(
            {"model": {"hidden_size": heads * width, "num_attention_heads": heads, "num_key_value_heads": shared}}
        ).model
    )
    query = torch.randn(rows, heads, positions, width).to(dtype)
    key, value = torch.randn(2, rows, shared, reach, width).to(dtype)
    is_seen = torch.ones(positions, reach, dtype=torch.bool).tril(reach - positions).expand(rows, 1, -1, -1)
    if is_masked and reach > positions:  # rows of different lengths, whose first slots hold nothing
        is_seen = is_seen & (torch.arange(reach) >= torch.tensor([0, 2, 5])[:, None, None, None])
    found = attention._attend(query, key, value, is_seen if is_masked else None)
    torch.testing.assert_close(
        found, _plain(query, key, value, is_seen), atol=2e-2 if dtype.itemsize == 2 else 1e-6, rtol=0
    )


def _plain(query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor) -> Tensor:
    """Attend in float32, head by head."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.float().repeat_interleave(groups, 1) for part in (key, value))
    scores = (query.float() @ key.mT) / query.shape[-1] ** 0.5
    return (F.softmax(scores.masked_fill(~is_seen, -torch.inf), -1) @ value).to(query.dtype)
