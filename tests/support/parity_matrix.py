"""Cells of the parity law beyond the sample of `mtp doctor --strategies`: every combination, and every three values."""

from dataclasses import fields, replace
from functools import cache
from itertools import combinations, product
from typing import Any

from mtp_lightning.diagnostics.parity_matrix import (
    ADAPTATIONS,
    BACKWARD_ORDERS,
    HEADS,
    RANKS,
    STAGES,
    UNEMBEDDINGS,
    Cell,
    adapted_cell,
)


def plain_cells() -> list[Cell]:
    """List every combination of models that are not adapted, under SGD."""
    names = ("stage", "ranks", "backward_order", "heads", "unembedding", "accumulation", "clips")
    return [
        Cell(**dict(zip(names, values, strict=True)))
        for values in product(STAGES, RANKS, BACKWARD_ORDERS, HEADS, UNEMBEDDINGS, (1, 3), (False, True))
        if values[3:5] != ("sequential", "replicated")
    ]


def whole_matrix() -> list[Cell]:
    """List every combination under SGD, every eighth of them under AdamW too, and all adapted models."""
    plain = plain_cells()
    adapted = [
        adapted_cell(stage, ranks, backward_order, name)
        for stage, ranks, backward_order, name in product(STAGES, RANKS, BACKWARD_ORDERS, ADAPTATIONS)
        if name != "none"
    ]
    return plain + [replace(cell, optimizer="adamw") for cell in plain[::8]] + adapted


@cache
def sample_of_triples() -> tuple[Cell, ...]:
    """Choose cells until all triples of values have met that meet in any cell: each time the one with most new ones."""
    triples = {cell: values_of(cell, 3) for cell in plain_cells()}
    missing, chosen = set[Any]().union(*triples.values()), []
    while missing:
        best = max(triples, key=lambda cell: len(triples[cell] & missing))
        missing -= triples[best]
        chosen.append(best)
    return tuple(chosen)


def values_of(cell: Cell, number: int) -> set[Any]:
    """Return every so many values of a cell, each with the name of its field."""
    return set(combinations([(field.name, getattr(cell, field.name)) for field in fields(cell)], number))
