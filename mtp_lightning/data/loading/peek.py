"""Look at one row the way training sees it: tokens, documents, and the target of every offset."""

from collections.abc import Sequence

import numpy as np
from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from mtp_lightning.console.screen import Screen
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.data.loading.factory import open_rows, prepare_data
from mtp_lightning.data.sampling.windows import SequenceSource
from mtp_lightning.data.shards.manifest import Split
from mtp_lightning.data.tokenizers.base import Tokenizer
from mtp_lightning.recipe.schema.root import Recipe

PIPED_WIDTH = 100
IGNORED = "·"


def peek(recipe: Recipe, *, row: int, split: Split) -> None:
    """Print one row of a split as a table, building the shards first when they are missing.

    Raises:
        DataError: The shards cannot be built or used, or there is no such row.
    """
    prepare_data(recipe)
    rows = open_rows(recipe, split)
    console, table = Screen(), row_table(recipe, rows, row)
    if not console.is_terminal:
        widest = Screen(width=10_000).measure(table).maximum
        console = Screen(width=max(PIPED_WIDTH, widest))
    console.print(table)


def row_table(recipe: Recipe, rows: SequenceSource, row: int) -> Table:
    """Return the table of one row: a line per token, a rule where a document ends and where the window does."""
    batch = rows.read(np.array([row]))
    tokens, documents = batch["tokens"][0].tolist(), batch["documents"][0].tolist()
    num_positions, num_offsets = recipe.data.seq_len, recipe.heads.num_offsets
    loss_mask = batch["loss_mask"][0].tolist() if "loss_mask" in batch else [True] * len(tokens)
    targets = targets_of_row(tokens, documents, loss_mask, num_offsets=num_offsets)
    rotary = _rotary_positions(documents) if recipe.data.document_mask else list(range(len(tokens)))
    begins = {position for position in range(1, len(tokens)) if documents[position] != documents[position - 1]}
    tokenizer = recipe_tokenizer(recipe)
    table = _empty_table(recipe, rows, row)
    for position, token in enumerate(tokens):
        is_target_only = position >= num_positions
        own = [] if is_target_only else targets[position]
        table.add_row(
            str(position),
            str(token),
            _shown(token, tokenizer),
            str(documents[position]),
            "" if is_target_only else str(rotary[position]),
            *([_shown(target, tokenizer) for target in own] or [Text()] * num_offsets),
            "target only" if is_target_only else _reason(own, documents[position : position + num_offsets + 1]),
            style="dim" if is_target_only else None,
            end_section=position + 1 == num_positions or position + 1 in begins,
        )
    return table


def targets_of_row(
    tokens: Sequence[int], documents: Sequence[int], loss_mask: Sequence[bool], *, num_offsets: int
) -> list[list[int | None]]:
    """Return for each position the target of every offset, by the definition; None where it is ignored.

    Offset k at position t predicts the token at t + k, and is ignored when that token is of another document or
    of a prompt (`loss_mask` false).

    >>> targets_of_row([5, 6, 7, 8], [0, 0, 1, 1], [True] * 4, num_offsets=2)
    [[6, None], [None, None]]
    """
    targets: list[list[int | None]] = []
    for position in range(len(tokens) - num_offsets):
        own: list[int | None] = []
        for offset in range(1, num_offsets + 1):
            there = position + offset
            is_target = documents[position] == documents[there] and loss_mask[there]
            own.append(tokens[there] if is_target else None)
        targets.append(own)
    return targets


def _empty_table(recipe: Recipe, rows: SequenceSource, row: int) -> Table:
    num_positions, num_offsets = recipe.data.seq_len, recipe.heads.num_offsets
    shape = f"T = {num_positions}, n = {num_offsets}"
    table = Table(
        title=f"{rows.split} row {row:,} of {len(rows):,}: {shape}\n{rows.describe(row)}",
        caption=f"{IGNORED} ignored target: it is of another document (boundary) or only read (prompt)",
        box=HORIZONTALS,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    for name in ("pos", "id"):
        table.add_column(name, justify="right")
    table.add_column("text", no_wrap=True, style="bold")
    table.add_column("doc", justify="right")
    table.add_column("rotary", justify="right")
    for offset in range(1, num_offsets + 1):
        table.add_column(f"+{offset}", no_wrap=True, min_width=3)
    table.add_column("ignored", no_wrap=True)
    return table


def _shown(token: int | None, tokenizer: Tokenizer) -> Text:
    return Text(IGNORED, style="dim") if token is None else Text(tokenizer.printable(token))


def _reason(targets: list[int | None], documents: Sequence[int]) -> str:
    """Say which offsets are ignored and why; once one crosses a boundary, so do all further ones."""
    offsets = [offset for offset, target in enumerate(targets, start=1) if target is None]
    beyond = [offset for offset in offsets if documents[offset] != documents[0]]
    prompt = [offset for offset in offsets if offset not in beyond]
    reasons = {"prompt": prompt, "boundary": beyond}
    return ", ".join(f"{_span(own[0], own[-1])}: {reason}" for reason, own in reasons.items() if own)


def _span(first: int, last: int) -> str:
    return f"+{first}" if first == last else f"+{first}…+{last}"


def _rotary_positions(documents: list[int]) -> list[int]:
    """Return positions that begin anew with every document."""
    positions: list[int] = []
    for index, document in enumerate(documents):
        goes_on = index > 0 and documents[index - 1] == document
        positions.append(positions[-1] + 1 if goes_on else 0)
    return positions
