"""The best tree of drafts for a model and its text: `mtp bench tree`."""

from pathlib import Path

import torch
from rich.table import Table

from mtp_lightning.bench.decoding.rounds import TREE_CHOICES, held_out_shares
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.console.tables import build_table, console
from mtp_lightning.decode import Tree, build_tree
from mtp_lightning.decode.settings import resolve_decoder
from mtp_lightning.decode.tree import write_tree


def bench_tree(path: Path, out: Path, *, num_drafts: int, device: torch.device, dtype: torch.dtype | None) -> None:
    """Measure the choices of every offset on held-out rows, grow a tree, show both, and write the tree.

    Raises:
        DecodingError: The model's heads read tokens, or there are none: no tree fits; or the file cannot be written.
        CheckpointError: There is no model in `path`.
        DataError: The recipe's shards are not there.
    """
    recipe, model = load_model(path, device=device, dtype=dtype)
    resolve_decoder(model, "tree")
    shares = held_out_shares(recipe, model)
    tree = build_tree(shares, num_drafts)
    write_tree(out, tree, shares)
    screen = console()
    screen.print(f"Choices of every offset: {recipe.name}", style="bold")
    screen.print(share_table(shares), "", sep="\n")
    screen.print(
        f"Shares of held-out positions at which a choice is the main head's for that token. The tree has "
        f"{tree.num_drafts} drafts and keeps {expected_length(tree, shares):.2f} tokens per step if offsets err "
        f"independently; the first choices alone keep {expected_length(_first_choices(shares), shares):.2f}."
    )
    screen.print(f"Tree written to {out}", soft_wrap=True)


def share_table(shares: list[list[float]]) -> Table:
    """Lay out the shares, a row per offset."""
    table = build_table(["offset", *(f"choice {rank}" for rank in range(1, TREE_CHOICES + 1))], left=0, gap=1)
    for offset, of_offset in enumerate(shares, 2):
        table.add_row(str(offset), *(f"{share:.1%}" for share in of_offset))
    return table


def expected_length(tree: Tree, shares: list[list[float]]) -> float:
    """Tokens that a step is expected to yield, were offsets right independently of each other.

    >>> expected_length(Tree((0, 1, 0), (0, 0, 1)), [[0.5, 0.25], [0.5]])
    2.0
    """
    chances = [1.0]
    for parent, rank, depth in zip(tree.parents, tree.ranks, tree.depths[1:], strict=True):
        chances.append(chances[parent] * shares[depth - 1][rank])
    return sum(chances)


def _first_choices(shares: list[list[float]]) -> Tree:
    return Tree(tuple(range(len(shares))), (0,) * len(shares))
