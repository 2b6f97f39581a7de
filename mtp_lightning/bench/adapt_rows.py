"""Rows of a comparison of adaptations: means over seeds, the table of them, and how to read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mtp_lightning.bench.adapt_measuring import Measured, Settings
from mtp_lightning.console.tables import BLANK, build_table
from mtp_lightning.evaluation.comparison import Spread, spread
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.schema.objective import ConstantWeights


@dataclass(frozen=True)
class OffsetSpread:
    """Share of positions whose true token is among the likeliest ones; None where there is no such head."""

    offset: int
    head: Spread | None
    marginal: Spread


@dataclass(frozen=True)
class AdaptRow:
    """All runs of one recipe."""

    name: str
    seeds: tuple[int, ...]  # of the runs that ended well
    num_runs: int
    offsets: tuple[OffsetSpread, ...]  # none where all have failed
    idle_offsets: tuple[int, ...]  # without a part in the loss

    @property
    def first(self) -> Spread:
        """Of the next token."""
        return self.offsets[0].head or self.offsets[0].marginal


def rows_of(measured: Sequence[Measured]) -> list[AdaptRow]:
    """Group runs by recipe, in the order given."""
    by_name: dict[str, list[Measured]] = {}
    for one in measured:
        by_name.setdefault(one.run.name, []).append(one)
    return [_row_of(name, runs) for name, runs in by_name.items()]


def _row_of(name: str, runs: list[Measured]) -> AdaptRow:
    done = [one for one in runs if one.report is not None]
    by_offset = zip(*(one.report["offsets"] for one in done if one.report), strict=True)
    return AdaptRow(
        name,
        tuple(one.run.seed for one in done),
        len(runs),
        tuple(_spread_of(list(figures)) for figures in by_offset),
        _idle_offsets(runs[0].run.stages),
    )


def _spread_of(figures: list[dict[str, Any]]) -> OffsetSpread:
    of_heads = [figure["head_top"] for figure in figures]
    head = None if None in of_heads else spread(of_heads)
    return OffsetSpread(figures[0]["offset"], head, spread([figure["marginal_top"] for figure in figures]))


def _idle_offsets(stages: Sequence[Recipe]) -> tuple[int, ...]:
    """Name the offsets that a constant weight of zero keeps out of the loss in every stage."""
    idle: set[int] | None = None
    for stage in stages:
        weights = stage.objective.weights
        values = weights.values or () if isinstance(weights, ConstantWeights) else ()
        of_stage = {offset for offset, value in enumerate(values, start=1) if value == 0}
        idle = of_stage if idle is None else idle & of_stage
    return tuple(sorted(idle or ()))


def adapt_table(rows: Sequence[AdaptRow], settings: Settings) -> Table:
    """Lay the rows out: the next token, then for every further one its head beside the main head's own guess."""
    best = f"top-{settings.top}"
    columns = ["\nrecipe", "\nseeds", f"next\n{best}"]
    for offset in range(2, settings.num_offsets + 1):
        columns += [f"{ordinal(offset)}\nhead {best}", f"{ordinal(offset)}\nmarginal {best}"]
    table = build_table(columns, left=0, gap=2)
    for row in rows:
        table.add_row(*_cells(row, settings.num_offsets))
    return table


def _cells(row: AdaptRow, num_offsets: int) -> list[str]:
    num_done = len(row.seeds)
    seeds = str(num_done) if num_done == row.num_runs else f"{num_done} of {row.num_runs}"
    if not row.offsets:
        return [row.name, seeds, "failed", *[BLANK] * (2 * num_offsets - 2)]
    pairs = (figure for offset in row.offsets[1:] for figure in (offset.head, offset.marginal))
    return [row.name, seeds, *map(text_of, (row.first, *pairs))]


def text_of(figure: Spread | None) -> str:
    """Write a mean, and half its interval where there are several seeds.

    >>> text_of(Spread(0.5, 0.01)), text_of(Spread(0.5, None)), text_of(None)
    ('0.500 ±0.010', '0.500', '-')
    """
    if figure is None:
        return BLANK
    return f"{figure.mean:.3f}" + ("" if figure.margin is None else f" ±{figure.margin:.3f}")


def ordinal(number: int) -> str:
    """Write an ordinal.

    >>> [ordinal(number) for number in (2, 3, 4, 11, 21)]
    ['2nd', '3rd', '4th', '11th', '21st']
    """
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if 10 < number % 100 < 20 else endings.get(number % 10, 'th')}"


def remarks(rows: Sequence[AdaptRow], measured: Sequence[Measured], settings: Settings) -> list[str]:
    """Say how to read the table, and what is not in it."""
    lines = [f"{one.run.title} failed: {one.failure}." for one in measured if one.failure is not None]
    report = next((one.report for one in measured if one.report is not None), None)
    if report is not None:
        lines += [
            f"Is the true token among the {settings.top} likeliest? At {report['num_positions']:,} positions at the "
            f"ends of {report['num_samples']} held-out texts, the same for all runs.",
            "marginal: without the head, by that row's own main head, summed over the tokens in between: "
            f"{settings.nucleus:.0%} of the probability, at most {settings.most_paths:,} paths.",
        ]
    for row in rows:
        if row.offsets and row.idle_offsets:
            offsets = " and ".join(ordinal(offset) for offset in row.idle_offsets)
            lines.append(f"{row.name} does not train its {offsets} head: that is what it started as.")
    if any(len(row.seeds) > 1 for row in rows):
        lines.append("±: half a 95 % interval over seeds (t).")
    if any(len(row.seeds) == 1 for row in rows):
        lines.append("A single seed has no interval: differences may be chance.")
    return lines


def rows_as_json(rows: Sequence[AdaptRow]) -> list[dict[str, Any]]:
    """Put rows into what JSON can hold, spreads as mean and margin."""
    return [
        {
            "recipe": row.name,
            "seeds": row.seeds,
            "runs": row.num_runs,
            "offsets": [
                {
                    "offset": of.offset,
                    "head": of.head and of.head._asdict(),
                    "marginal": of.marginal._asdict(),
                    "is_trained": of.offset not in row.idle_offsets,
                }
                for of in row.offsets
            ],
        }
        for row in rows
    ]


def runs_as_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Put single runs into what JSON can hold."""
    return [
        {
            "recipe": one.run.name,
            "seed": one.run.seed,
            "checkpoint": one.checkpoint,
            "steps": sum(stage.run.steps for stage in one.run.stages),
            "failure": one.failure,
            "report": one.report,
        }
        for one in measured
    ]
