"""Several drafts at once: a tree of candidates, verified in one forward under an ancestor mask.

Node 0 is the committed token. A node of depth d and rank r holds the r-th likeliest token of offset d+1, spoken from
the last committed position; heads that read no tokens say the same below every branch, so the tree is static. The
paths that can be kept are those whose every token the main head agrees with: siblings differ, so there is one.
"""

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from mtp_lightning.decode.sampling import Generator, Sampling, draw, uniform
from mtp_lightning.decode.verify import AcceptResult
from mtp_lightning.errors import DecodingError, refusal_of, remedy_of
from mtp_lightning.files.durable import write_whole
from mtp_lightning.files.untrusted import read_object
from mtp_lightning.model.mtp_model import MtpModel

MOST_NODES = 64


@final
@dataclass(frozen=True)
class Tree:
    """Nodes in an order in which parents come first; node 0 is the root."""

    parents: tuple[int, ...]  # of every node but the root
    ranks: tuple[int, ...]  # of every node but the root: 0 for a head's first choice

    @property
    def num_drafts(self) -> int:
        """Nodes besides the root."""
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node, the root's 0 included."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def breadths(self) -> tuple[int, ...]:
        """How many choices of each head are drafted, offset 2 first."""
        depths = self.depths[1:]
        return tuple(
            1 + max(rank for rank, depth in zip(self.ranks, depths, strict=True) if depth == level)
            for level in range(1, 1 + max(depths, default=0))
        )


def build_tree(accuracies: Sequence[Sequence[float]], num_drafts: int) -> Tree:
    """Grow the tree that is expected to keep most drafts, one node at a time [Cai 2024, section 2.3].

    Args:
        accuracies: For each offset from 2 on, how often its first, second, ... choice is the right one.
        num_drafts: Nodes besides the root; fewer where nothing is left that could be right.

    >>> build_tree([[0.6, 0.2], [0.5, 0.3]], 4)
    Tree(parents=(0, 1, 0, 1), ranks=(0, 0, 1, 1))
    """
    parents: list[int] = []
    ranks: list[int] = []
    frontier = _candidates(accuracies, parent=0, depth=0, chance=1.0)
    heapq.heapify(frontier)
    while frontier and len(parents) < num_drafts:
        chance, depth, rank, parent = heapq.heappop(frontier)
        parents.append(parent)
        ranks.append(rank)
        for candidate in _candidates(accuracies, parent=len(parents), depth=depth, chance=-chance):
            heapq.heappush(frontier, candidate)
    return Tree(tuple(parents), tuple(ranks))


def _candidates(
    accuracies: Sequence[Sequence[float]], *, parent: int, depth: int, chance: float
) -> list[tuple[float, int, int, int]]:
    if depth >= len(accuracies):
        return []
    below = enumerate(accuracies[depth])
    return [(-chance * share, depth + 1, rank, parent) for rank, share in below if share > 0]


def check_tree(tree: Tree, num_offsets: int, vocab_size: int) -> None:
    """Refuse a tree that the model's heads, which score `vocab_size` ids, cannot fill.

    Raises:
        DecodingError: It is empty, too large, deeper than there are heads, or wider than the vocabulary.
    """
    size = tree.num_drafts
    checks: tuple[tuple[str, object, Callable[[], bool]], ...] = (
        (f"a tree must have 1 to {MOST_NODES} drafts", size, lambda: 1 <= size <= MOST_NODES),
        ("a tree must name a rank for every draft", tree.ranks, lambda: len(tree.ranks) == size),
        (
            "a tree must list parents before their children",
            tree.parents,
            lambda: all(0 <= parent <= index for index, parent in enumerate(tree.parents)),
        ),
        (
            "siblings in a tree must have different ranks",
            tree.ranks,
            lambda: len({*zip(tree.parents, tree.ranks, strict=True)}) == size,
        ),
        (
            f"ranks in a tree must lie in 0 to {vocab_size - 1}",
            tree.ranks,
            lambda: all(0 <= rank < vocab_size for rank in tree.ranks),
        ),
        (
            f"a tree must be at most n - 1 = {num_offsets - 1} deep",
            tree.parents,
            lambda: max(tree.depths) < num_offsets,
        ),
    )
    for expected, found, is_kept in checks:
        if not is_kept():
            raise DecodingError(expected, str(found), "Build a tree from this model with `mtp bench tree`")


@final
class TreeTables:
    """A tree as the tensors that a step needs."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        depths = tree.depths
        paths = [[0]]
        for index, parent in enumerate(tree.parents):
            paths.append([*paths[parent], index + 1])
        deepest = max(depths)
        children: list[list[int]] = [[] for _ in depths]
        for index in sorted(range(tree.num_drafts), key=lambda index: tree.ranks[index]):
            children[tree.parents[index]].append(index + 1)
        widest = max(len(below) for below in children)
        self.deepest, self.breadths = deepest, tree.breadths
        self.depths = torch.tensor(depths, device=device)  # (T,)
        self.parents = torch.tensor(tree.parents, device=device)  # (T-1,)
        self.ranks = torch.tensor(tree.ranks, device=device)
        self.paths = torch.tensor([path + path[-1:] * (deepest + 1 - len(path)) for path in paths], device=device)
        self.children = torch.tensor([below + [0] * (widest - len(below)) for below in children], device=device)
        self.ancestry = torch.tensor([[node in path for node in range(len(depths))] for path in paths], device=device)

    def fill(self, logits: Tensor) -> Tensor:
        """Give every node but the root its token: heads' scores (B, K, V), K at least the depth -> (B, T-1)."""
        choices = logits.topk(max(self.breadths), dim=-1).indices  # (B, K, R)
        return choices[:, self.depths[1:] - 1, self.ranks]


def accept_tree_greedy(logits: Tensor, nodes: Tensor, tables: TreeTables) -> tuple[AcceptResult, Tensor]:
    """Keep the path on which every token is the main head's first choice after its parent.

    Args:
        logits: (B, T, V) scores of the main head at every node.
        nodes: (B, T) tokens of the nodes, the committed one first.
        tables: The tree.

    Returns:
        The verdict, and the (B, depth+1) nodes of the path, the last kept one repeated.
    """
    choices = logits.argmax(-1)  # (B, T)
    is_right = nodes[:, 1:] == choices[:, tables.parents]  # (B, T-1)
    is_right = torch.nn.functional.pad(is_right, (1, 0), value=True)
    # A path is kept if all its nodes are right: count the wrong ones among the ancestors of each.
    num_wrong = (~is_right).to(torch.float32) @ tables.ancestry.T.to(torch.float32)  # (B, T)
    depth = torch.where(num_wrong == 0, tables.depths, -1)
    accepted, node = depth.max(1)  # (B,)
    path = tables.paths[node]  # (B, depth+1)
    return AcceptResult(accepted, choices.gather(1, path)), path


def accept_tree_sampled(
    logits: Tensor, nodes: Tensor, tables: TreeTables, sampling: Sampling, generator: Generator
) -> tuple[AcceptResult, Tensor]:
    """Walk down from the root, sibling by sibling: keep x with probability p(x), else remove x from p, renormalise.

    What is left when no sibling is kept is drawn from. The text has the law of plain sampling: given that earlier
    siblings failed, what is left is the law of what comes out [Miao 2023]. Arguments and results as in
    `accept_tree_greedy`.
    """
    probs = sampling.probabilities(logits)  # (B, T, V)
    rows = torch.arange(len(nodes), device=nodes.device)
    node = torch.zeros_like(rows)  # (B,) where each row stands
    is_moving = torch.ones_like(rows, dtype=torch.bool)
    left = probs[rows, node]  # (B, V)
    for _ in range(tables.deepest):
        here, has_moved = node, torch.zeros_like(is_moving)
        for rank in range(tables.children.shape[1]):
            child = tables.children[here, rank]
            is_tried = is_moving & ~has_moved & (child > 0)
            token = nodes[rows, child][:, None]  # (B, 1)
            chance = left.gather(1, token)[:, 0] / left.sum(1)
            is_kept = is_tried & (uniform(chance, generator) < chance)
            node = torch.where(is_kept, child, node)
            has_moved |= is_kept
            failed = torch.where(is_tried & ~is_kept, 0, left.gather(1, token)[:, 0])
            left = left.scatter(1, token, failed[:, None])
        left = torch.where(has_moved[:, None], probs[rows, node], left)
        is_moving = has_moved
    accepted, path = tables.depths[node], tables.paths[node]
    block = nodes.gather(1, path).roll(-1, 1).scatter(1, accepted[:, None], draw(left, generator)[:, None])
    return AcceptResult(accepted, block), path


def read_tree(path: Path) -> Tree:
    """Read a tree that `write_tree` has written.

    Raises:
        DecodingError: The file cannot be read, or is no tree.
    """
    try:
        document = read_object(path)
        columns = [tuple(document[name]) for name in ("parents", "ranks")]
        if odd := [number for column in columns for number in column if type(number) is not int]:
            raise ValueError(f"{odd[0]!r} in place of a whole number")
        return Tree(*columns)
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
        write_whole(path, json.dumps(document).encode() + b"\n")
    except OSError as error:
        raise DecodingError(
            "the file for a tree must be writable", refusal_of(error, path), remedy_of(error, "--out")
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
    num_choices = min(num_choices, model.unembedding.num_drafted)
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
