"""The grid of a benchmark: which recipes are measured, and which cannot run."""

from dataclasses import dataclass

from mtp_lightning.errors import Fault
from mtp_lightning.planner.layout import obstacle, with_backward_order, with_offsets
from mtp_lightning.recipe.layer_counts import num_head_layers, num_trunk_layers
from mtp_lightning.recipe.schema.root import Recipe


@dataclass(frozen=True)
class Cell:
    """One figure to measure: a recipe with its number of offsets and backward order, or what keeps it from running."""

    recipe: Recipe
    obstacle: Fault | None

    @property
    def num_offsets(self) -> int:
        """Number n of offsets."""
        return self.recipe.heads.num_offsets

    @property
    def backward_order(self) -> str:
        """Order of head forward and backward."""
        return self.recipe.objective.backward_order

    @property
    def key(self) -> tuple[int, str]:
        """What tells the cell from the others."""
        return self.num_offsets, self.backward_order

    @property
    def layers(self) -> str:
        """Transformer layers of trunk and heads, as shown."""
        return f"{num_trunk_layers(self.recipe)} + {num_head_layers(self.recipe)}"


def build_cells(recipe: Recipe, offsets: list[int], backward_orders: list[str]) -> list[Cell]:
    """Combine every number of offsets with every backward order, each once, in the given order.

    >>> [cell.key for cell in build_cells(Recipe(), [1, 4, 1], ["sequential"])]
    [(1, 'sequential'), (4, 'sequential')]
    """
    variants = [with_offsets(recipe, num_offsets) for num_offsets in dict.fromkeys(offsets)]
    return [
        Cell(with_backward_order(variant, backward_order), obstacle(variant))
        for variant in variants
        for backward_order in dict.fromkeys(backward_orders)
    ]


def impossible(cells: list[Cell]) -> list[str]:
    """Say for each number of offsets that cannot run what is in the way and what to do."""
    faults = {cell.num_offsets: cell.obstacle for cell in cells if cell.obstacle is not None}
    return [
        f"n={num_offsets} is not possible: {fault.path} {fault.expected}. {fault.hint}"
        for num_offsets, fault in faults.items()
    ]


def describe_shape(recipe: Recipe) -> str:
    """Say in one line what model and batch are measured.

    >>> describe_shape(Recipe())
    'V=257, D=256, T=256, 16 rows in micro-batches of 16, fp32, parallel heads'
    """
    model, batch, heads = recipe.model, recipe.batch, recipe.heads
    rows = (
        f"{batch.global_batch_size} rows in micro-batches of {batch.micro_batch_size}"
        if batch.global_batch_size > 1
        else "1 row"
    )
    order = f"{heads.order} " if heads.kind == "chained" else ""
    return (
        f"V={model.vocab_size:,}, D={model.hidden_size:,}, T={recipe.data.seq_len:,}, {rows}, "
        f"{recipe.run.precision}, {order}{heads.kind} heads"
    )


def describe_matching(recipe: Recipe) -> str:
    """Say whether the cells compare at equal total layers.

    >>> describe_matching(Recipe())
    'Equal total layers: the heads take theirs from the 8 of the model.'
    """
    if recipe.heads.kind in ("linear", "medusa"):
        return f"The heads hold no transformer layers; the trunk has {recipe.model.num_hidden_layers} at every n."
    if recipe.heads.layers_from_trunk:
        return f"Equal total layers: the heads take theirs from the {recipe.model.num_hidden_layers} of the model."
    return "NOT at equal total layers: heads.layers_from_trunk is false, so every offset adds layers to n=1."
