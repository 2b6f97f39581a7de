"""Trees as JSON files, and the shares that they are grown from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.decode.tree import Tree
from mtp_lightning.errors import DecodingError
from mtp_lightning.model.mtp_model import MtpModel


def read_tree(path: Path) -> Tree:
    """Read a tree that `write_tree` has written.

    Raises:
        DecodingError: The file cannot be read, or is no tree.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        return Tree(*(tuple(int(number) for number in document[name]) for name in ("parents", "ranks")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DecodingError(
            "the file of a tree must hold `parents` and `ranks`, as `mtp bench tree` writes them",
            f"{path}: {error}",
            "Write one with `mtp bench tree`",
        ) from None


def write_tree(path: Path, tree: Tree, shares: Sequence[Sequence[float]]) -> None:
    """Write a tree, and beside it the shares that it was grown from.

    Raises:
        DecodingError: The file cannot be written.
    """
    document = {"parents": tree.parents, "ranks": tree.ranks, "shares": shares}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document) + "\n")
    except OSError as error:
        raise DecodingError(
            "the file for a tree must be writable", f"{path}: {error.strerror}", "Name another"
        ) from None


@torch.inference_mode()
def choice_shares(model: MtpModel, tokens: Tensor, documents: Tensor, num_choices: int) -> list[list[float]]:
    """Measure how often the first, second, ... choice of every offset from 2 on is the main head's for that token.

    Args:
        model: The model.
        tokens: (R, T+n) rows of text; one is held in memory at a time.
        documents: (R, T+n) documents that the tokens belong to.
        num_choices: How many choices to look at.
    """
    num_choices = min(num_choices, model.section.vocab_size)
    hits = torch.zeros(model.num_offsets - 1, num_choices, dtype=torch.float64)
    totals = torch.zeros(model.num_offsets - 1, 1, dtype=torch.float64)
    for row, of_row in zip(tokens, documents, strict=True):
        states = model.hidden_states(row[None], of_row[None])
        spoken = model.unembedding.logits(1, states[1]).argmax(-1)[0]  # (T,)
        for offset in range(2, model.num_offsets + 1):
            scores = model.unembedding.logits(offset, states[offset])[0, : len(spoken) - offset + 1]  # (T', V)
            is_hit = scores.topk(num_choices).indices == spoken[offset - 1 :, None]  # (T', R)
            hits[offset - 2] += is_hit.sum(0).cpu()
            totals[offset - 2] += len(is_hit)
    shares: list[list[float]] = (hits / totals.clamp(min=1)).tolist()
    return shares
