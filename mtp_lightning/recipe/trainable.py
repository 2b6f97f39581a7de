"""Which parts of a recipe's model are trained, which offsets have a loss, and which a step must run.

The one statement of these rules, and free of torch: `model/freezing.py` and the training step apply them to modules,
the planner to counts.
"""

from collections.abc import Callable, Collection, Iterable

from mtp_lightning.recipe.head_tree import TRUNK, has_final_norm, parent_offset
from mtp_lightning.recipe.schema.model import HeadsSection
from mtp_lightning.recipe.schema.root import Recipe

ADDED = ("lora", "layer_mix")
"""Roles of the parameters that an adaptation adds: trained unless `freeze` names them, whatever else is."""


def mixing_offsets(recipe: Recipe) -> tuple[int, ...]:
    """List the offsets that read a mixture of the trunk's layers: of a chain, only the one that reads the trunk.

    >>> mixing_offsets(Recipe.model_validate({"adapt": {"layer_mix": {"main_head": False}}}))
    (2, 3, 4)
    """
    section, heads = recipe.adapt.layer_mix, recipe.heads
    if section is None:
        return ()
    offsets = range(1, heads.num_offsets + 1)
    reading = [offset for offset in offsets if parent_offset(heads, offset) == TRUNK]
    return tuple(offset for offset in reading if offset > 1 or section.main_head)


def freezes_anything(recipe: Recipe) -> bool:
    """Return whether a recipe leaves any parameter untrained."""
    return recipe.first_trained_offset is not None or bool(recipe.frozen_parts) or recipe.adapt.lora is not None


class TrainableParts:
    """Trained parts of a recipe's model, by role of the parameters and by offset.

    Attributes:
        first: smallest offset whose head is trained.
        frozen_roles: roles of which no parameter is trained.
        trunk: whether the trunk's own parameters are trained.
        updates: whether there are low-rank updates that are trained.
        mixtures: whether mixtures of layers are trained, where there are any.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.first = recipe, recipe.first_trained_offset or 1
        is_trunk_frozen = self.first > 1 or recipe.adapt.lora is not None
        self.frozen_roles = {*recipe.frozen_parts, *(["trunk"] if is_trunk_frozen else [])}
        self.trunk = "trunk" not in self.frozen_roles
        self.updates = recipe.adapt.lora is not None and "lora" not in self.frozen_roles
        self.mixtures = "layer_mix" not in self.frozen_roles

    def is_trained(self, role: str, offsets: Collection[int] = ()) -> bool:
        """Return whether a parameter is trained: not of a frozen role, nor of use to an offset before the first.

        Args:
            role: of the parameter.
            offsets: that it computes as part of their head, final norm or V x D matrix; none for other parameters.

        >>> parts = TrainableParts(Recipe.model_validate({"freeze": ["offsets_below_3"]}))
        >>> parts.is_trained("heads", [3]), parts.is_trained("unembedding", [1, 2, 3, 4]), parts.is_trained("trunk")
        (True, False, False)
        """
        if role in self.frozen_roles:
            return False
        return role in ADDED or self.first == 1 or min(offsets, default=0) >= self.first

    @property
    def any_head(self) -> bool:
        """Whether heads that hold parameters of their own are trained."""
        return "heads" not in self.frozen_roles

    @property
    def token_order(self) -> bool:
        """Whether the matrix of the token-order loss is trained."""
        return self.is_trained("unembedding")

    def head(self, offset: int) -> bool:
        """Return whether an offset's own modules are trained."""
        return self.is_trained("heads", [offset])

    def matrix(self, offset: int) -> bool:
        """Return whether the V x D matrix of an offset is trained; a tied one goes with the trunk."""
        if self.recipe.model.tie_word_embeddings:
            return self.trunk
        is_own = self.recipe.heads.unembedding == "replicated"
        return self.is_trained("unembedding", [offset if is_own else 1])

    def matrix_number(self, offset: int) -> int:
        """Return the number of the V x D matrix of an offset."""
        return offset if self.recipe.heads.unembedding == "replicated" else 1

    def shared_norm(self, offset: int) -> bool:
        """Return whether an offset's state passes a final norm that is trained though its head may not be.

        Norms of heads from `first` on are not asked for: those heads are trained, and their states have a gradient.
        """
        return has_final_norm(self.recipe.heads, offset) and self.is_trained("unembedding")

    @property
    def is_any_trained(self) -> bool:
        """Whether there is any parameter to train."""
        heads = self.recipe.heads
        has_heads = self.any_head and (heads.kind in ("parallel", "chained") or heads.num_offsets > 1)
        has_mixtures = bool(mixing_offsets(self.recipe)) and self.mixtures
        return self.updates or has_mixtures or has_heads or self.trunk or self.token_order


def first_offset_with_loss(recipe: Recipe) -> int:
    """Return the smallest offset whose loss has a gradient: 1 under low-rank updates, else the first trained head.

    >>> freeze = ["offsets_below_3"]
    >>> first_offset_with_loss(Recipe.model_validate({"freeze": freeze}))
    3
    >>> first_offset_with_loss(Recipe.model_validate({"freeze": freeze, "adapt": {"lora": {}}}))
    1
    """
    parts = TrainableParts(recipe)
    return 1 if parts.updates else parts.first


def offsets_to_run(with_loss: Iterable[int], parent: Callable[[int], int], *, reads_main: bool) -> set[int]:
    """Return the offsets that a step runs: those with a loss, and all that their states depend on.

    Args:
        with_loss: offsets whose loss has a weight.
        parent: the offset that an offset reads, or `TRUNK`.
        reads_main: the main head is needed too, to compare the others with; also where it is frozen.

    >>> sorted(offsets_to_run([3], lambda offset: offset - 1, reads_main=False))
    [1, 2, 3]
    """
    needed: set[int] = set()
    for offset in {*with_loss, *([1] if reads_main else [])}:
        while offset != TRUNK and offset not in needed:
            needed.add(offset)
            offset = parent(offset)
    return needed


def planned_offsets(recipe: Recipe) -> list[int]:
    """List the offsets that a step of a recipe runs while all have a weight, each after the one that it reads.

    >>> planned_offsets(Recipe.model_validate({"freeze": ["offsets_below_3"]}))
    [3, 4]
    """
    heads = recipe.heads
    with_loss = range(first_offset_with_loss(recipe), heads.num_offsets + 1)
    reads_main = recipe.objective.distill is not None
    needed = offsets_to_run(with_loss, lambda offset: parent_offset(heads, offset), reads_main=reads_main)
    depths = _depths(heads, needed)
    return sorted(sorted(needed), key=lambda offset: depths[offset])


def _depths(heads: HeadsSection, offsets: Iterable[int]) -> dict[int, int]:
    """Count the offsets on the way from the trunk to each; a chain of hundreds is no recursion."""
    depths = {TRUNK: 0}
    for offset in offsets:
        way = []
        while offset not in depths:
            way.append(offset)
            offset = parent_offset(heads, offset)
        for count, passed in enumerate(reversed(way), start=depths[offset] + 1):
            depths[passed] = count
    return depths
