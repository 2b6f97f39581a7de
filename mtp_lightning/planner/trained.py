"""Which parts of a recipe's model are trained, and which offsets a step needs: `model/freezing.py` without a model."""

from mtp_lightning.recipe.rules.adapt import mixing_offsets
from mtp_lightning.recipe.schema.root import Recipe

TRUNK = 0  # in the place of an offset, where heads name what they read


class Trained:
    """Answers for every part of a recipe's model."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.heads = recipe, recipe.heads
        self.frozen = {*recipe.frozen_parts}
        self.first = recipe.first_trained_offset or 1
        whole = self.first == 1
        self.trunk = whole and "trunk" not in self.frozen and recipe.adapt.lora is None
        self.updates = recipe.adapt.lora is not None and "lora" not in self.frozen
        self.mixtures = "layer_mix" not in self.frozen
        self.token_order = whole and "unembedding" not in self.frozen
        self.mixing = mixing_offsets(recipe)

    @property
    def any_head(self) -> bool:
        """Whether heads that hold parameters of their own are trained."""
        return "heads" not in self.frozen

    def head(self, offset: int) -> bool:
        """Tell whether an offset's own modules are trained."""
        return self.any_head and offset >= self.first

    def matrix(self, offset: int) -> bool:
        """Tell whether the V x D matrix that scores an offset is trained; a tied one goes with the trunk."""
        if self.recipe.model.tie_word_embeddings:
            return self.trunk
        is_own = self.first == 1 or (self.heads.unembedding == "replicated" and offset >= self.first)
        return "unembedding" not in self.frozen and is_own

    def matrix_number(self, offset: int) -> int:
        """Number of the V x D matrix that scores an offset."""
        return offset if self.heads.unembedding == "replicated" else 1

    def norm_after(self, offset: int) -> bool:
        """Tell whether a trained final norm gives an offset's state a gradient path.

        Heads from `trainable_from` on that have norms of their own are not asked: they are trained, and have a path.
        """
        has_none = self.heads.kind == "medusa" and offset > 1
        return self.first == 1 and "unembedding" not in self.frozen and not has_none

    def source(self, offset: int) -> int:
        """Name the offset whose state this one reads, or `TRUNK`.

        >>> chain = Trained(Recipe.model_validate({"heads": {"kind": "chained", "order": "anticausal"}}))
        >>> [chain.source(offset) for offset in (1, 2, 3, 4)]
        [2, 3, 4, 0]
        """
        if self.heads.kind in ("parallel", "linear", "medusa"):
            return TRUNK
        if (self.heads.kind, self.heads.order) == ("chained", "anticausal"):
            return TRUNK if offset == self.heads.num_offsets else offset + 1
        return offset - 1

    def reads_path(self, offset: int, has_path: dict[int, bool]) -> bool:
        """Tell whether what an offset reads has a gradient path, given which states have one."""
        source, kind = self.source(offset), self.heads.kind
        detaches_input = self.heads.detach_trunk and offset > 1 and source in (TRUNK, 1)
        is_mixed = offset in self.mixing and self.mixtures
        state = (has_path[source] and not detaches_input) or is_mixed
        if offset == 1 or not (kind == "medusa" or self._reads_normed):
            return state
        return state or self.norm_after(1 if kind == "medusa" else source)

    @property
    def _reads_normed(self) -> bool:
        return self.heads.kind in ("sequential", "recursive") and self.heads.hidden == "post_norm"

    def needed_offsets(self) -> list[int]:
        """List the offsets that are run, each after the one that it reads.

        Frozen heads are, where their loss teaches low-rank updates, where others read them or are compared with them.

        >>> Trained(Recipe.model_validate({"freeze": ["offsets_below_3"]})).needed_offsets()
        [3, 4]
        """
        offsets = range(1, self.heads.num_offsets + 1)
        active = {offset for offset in offsets if offset >= (1 if self.updates else self.first)}
        if self.recipe.objective.distill is not None:
            active.add(1)
        needed: set[int] = set()
        for offset in active:
            while offset != TRUNK:
                needed.add(offset)
                offset = self.source(offset)
        is_reversed = (self.heads.kind, self.heads.order) == ("chained", "anticausal")
        return sorted(needed, reverse=is_reversed)
