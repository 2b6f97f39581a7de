"""What a position goes through, forward and backward, where parts of the model are frozen.

What is frozen is always run forward, and backward only if something that is trained lies before it: then for the
gradient of its input alone. A product with a matrix therefore counts once (forward), twice (and the gradient of the
input) or three times (and that of the matrix). The trunk's is the case that matters: frozen, it is run without
autograd; under low-rank updates gradients pass through it, although its matrices are not trained.

Trained parts and offsets that run come from `recipe/trainable.py`, as in the model; gradient paths are followed as
autograd does, so that torch counts the same products in a real step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mtp_lightning.planner.counts import layer_weights
from mtp_lightning.recipe.draft_vocabulary import draft_vocab_size
from mtp_lightning.recipe.head_kinds import registered
from mtp_lightning.recipe.head_tree import TRUNK, detaches_input, norm_before, parent_offset
from mtp_lightning.recipe.layer_counts import num_trunk_layers
from mtp_lightning.recipe.rules.adapt import adapted_targets
from mtp_lightning.recipe.schema.model import ModelSection
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import TrainableParts, mixing_offsets, planned_offsets

ALL_PROJECTIONS = frozenset({"q", "k", "v", "o", "gate", "up", "down"})


@dataclass(frozen=True, kw_only=True)
class MatmulCost:
    """Products per position: with entries of matrices, and between positions, in layers; both by what they are for."""

    forward: int = 0
    inputs: int = 0  # for gradients of what is multiplied
    weights: int = 0  # for gradients of the matrices
    layers: int = 0  # transformer layers
    layers_back: int = 0  # of these, layers whose attention the backward pass goes through

    def __add__(self, other: "MatmulCost") -> "MatmulCost":
        return MatmulCost(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def entries(self) -> int:
        """Products with an entry of a matrix, of 2 operations each."""
        return self.forward + self.inputs + self.weights

    @property
    def needs_backward(self) -> bool:
        """Whether the backward pass goes through any of it."""
        return self.inputs + self.weights > 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """Trunk or heads."""

    work: MatmulCost
    keeps: frozenset[str] = ALL_PROJECTIONS  # projections whose inputs are kept by a layer that gradients pass


@dataclass(frozen=True, kw_only=True)
class BackwardFlow:
    """A step's work in the trunk, in heads and at the unembedding, and what of it the backward pass holds on to."""

    trunk: Part
    heads: Part
    unembedding: MatmulCost
    num_losses: int  # tensors of logits that a loss is computed from
    num_scored: int  # entries of the vocabulary in them, per position, in all
    most_scored: int  # and in the largest
    num_matrix_gradients: int  # V x D gradients that are summed up
    num_mixed_states: int = 0  # that only mixtures keep, in a trunk without autograd
    teacher: MatmulCost = MatmulCost()  # scores of the main head, made again for every offset that is compared with it
    drafts: MatmulCost = MatmulCost()  # scores that a rollout makes ahead of the losses, but in the sequential order
    reads_drafts: bool = False  # far offsets run over two streams
    num_compared: int = 0  # such offsets
    num_teacher_scores: int = 0  # entries of these scores, per position, in all
    num_compared_entries: int = 0  # of their distributions, per position, in all

    @property
    def all(self) -> MatmulCost:
        """All of it, but what is computed again."""
        return self.trunk.work + self.heads.work + self.unembedding

    def flops(self, attended: int) -> int:
        """Count the operations per position, where each query is as wide, times the positions it meets, as is said."""
        return 2 * self.all.entries + self.attention_flops(attended)

    def attention_flops(self, attended: int) -> int:
        """Count those between positions alone: two products forward, and twice as many backward."""
        return (4 * self.all.layers + 8 * self.all.layers_back) * attended


def backward_flow_of(recipe: Recipe) -> BackwardFlow:
    """Follow a position through a step of the recipe, every offset that is taught having a weight.

    >>> everything = backward_flow_of(Recipe()).all
    >>> everything.forward == everything.inputs == everything.weights
    True
    >>> trunk = backward_flow_of(Recipe.model_validate({"freeze": ["trunk", "unembedding"]})).trunk.work
    >>> trunk.inputs, trunk.weights, trunk.layers_back
    (0, 0, 0)
    """
    walk = _Walk(recipe)
    walk.run()
    trained = walk.trained
    updated = frozenset(adapted_targets(recipe)) if trained.updates else frozenset()
    updates_heads = recipe.adapt.lora is not None and recipe.adapt.lora.in_heads
    has_mixtures = bool(mixing_offsets(recipe)) and trained.mixtures
    return BackwardFlow(
        trunk=Part(work=walk.trunk, keeps=ALL_PROJECTIONS if trained.trunk else updated),
        heads=Part(
            work=walk.heads,
            keeps=ALL_PROJECTIONS if trained.any_head else updated if updates_heads else frozenset(),
        ),
        unembedding=walk.unembedding,
        num_losses=len(walk.scored),
        num_scored=sum(walk.scored),
        most_scored=max(walk.scored, default=0),
        num_matrix_gradients=len(walk.matrices),
        num_mixed_states=num_trunk_layers(recipe) if has_mixtures and not walk.trunk.layers_back else 0,
        teacher=walk.teacher,
        drafts=walk.drafts,
        reads_drafts=walk.reads_drafts,
        num_compared=walk.num_compared,
        num_teacher_scores=walk.num_teacher_scores,
        num_compared_entries=walk.num_compared_entries,
    )


class _Walk:
    """The way from the embedding to all losses; notes which states have a gradient path, as autograd would."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.trained = recipe, TrainableParts(recipe)
        self.trunk = self.heads = self.unembedding = self.teacher = self.drafts = MatmulCost()
        rollout = recipe.objective.rollout
        self.reads_drafts = rollout is not None and rollout.where == "all"
        self.scored: list[int] = []  # entries of the vocabulary that each loss is computed from
        self.num_compared = self.num_teacher_scores = self.num_compared_entries = 0
        self.matrices: set[int] = set()  # numbers of those that get a gradient
        self.has_path: dict[int, bool] = {}  # by offset

    def run(self) -> None:
        """Walk through trunk, heads and unembedding."""
        trained = self.trained
        stack = _Stack(self.recipe, is_trained=trained.trunk, is_updated=self.recipe.adapt.lora is not None)
        self.trunk, self.has_path[TRUNK] = stack.run(num_trunk_layers(self.recipe), has_path=trained.trunk)
        offsets = planned_offsets(self.recipe)
        for offset in offsets:
            self._run_head(offset)
        if self.recipe.objective.rollout is not None:
            size = draft_vocab_size(self.recipe) * self.recipe.model.hidden_size
            scored = product(size, reads=False, is_trained=False)
            for _ in set(offsets) & set(range(2, self.recipe.heads.num_offsets)):
                self.drafts += scored
        for offset in offsets:  # the main head, which others are compared with, may have come last
            self._compare(offset)

    def _run_head(self, offset: int) -> None:
        recipe, trained = self.recipe, self.trained
        heads, model, is_trained, own_work = recipe.heads, recipe.model, trained.head(offset), MatmulCost()
        has_path = self._reads_path(offset)
        num_layers = heads.layers_per_head if heads.kind in ("parallel", "chained") else 0
        if (own := registered(heads.kind)) is not None:
            num_layers, (entries, _) = own.num_layers(heads, offset), own.weights_beside_layers(model, heads, offset)
            own_work += product(entries, reads=has_path, is_trained=is_trained)
            has_path = has_path or (is_trained and entries > 0)
        if heads.kind in ("sequential", "recursive") and offset > 1:
            reads = has_path or is_trained or (trained.trunk and not heads.detach_trunk)  # the norms before it, too
            own_work += product(2 * model.hidden_size**2, reads=reads, is_trained=is_trained)
            has_path, num_layers = reads, heads.layers_per_head
        for _ in range({"linear": 1, "medusa": heads.layers_per_head}.get(heads.kind, 0) if offset > 1 else 0):
            own_work += product(model.hidden_size**2, reads=has_path, is_trained=is_trained)
            has_path = has_path or is_trained
        lora = recipe.adapt.lora
        stack = _Stack(recipe, is_trained=is_trained, is_updated=lora is not None and lora.in_heads)
        work, self.has_path[offset] = stack.run(num_layers, has_path=has_path)
        own_work += work
        for _ in range(2 if self.reads_drafts and offset > 2 else 1):
            self.heads += own_work

    def _reads_path(self, offset: int) -> bool:
        """Whether what an offset reads has a gradient path: its parent, through a norm or without, or a mixture."""
        heads, trained = self.recipe.heads, self.trained
        parent, norm = parent_offset(heads, offset), norm_before(heads, offset)
        is_mixed = offset in mixing_offsets(self.recipe) and trained.mixtures
        has_path = self.has_path[parent] and not detaches_input(heads, offset, parent)
        return has_path or is_mixed or (norm is not None and trained.shared_norm(norm))

    def _compare(self, offset: int) -> None:
        """Score an offset, if that teaches anything: an own matrix or norm, or what its state depends on."""
        trained, matrix = self.trained, self.trained.matrix_number(offset)
        reads = self.has_path[offset] or trained.shared_norm(offset)
        scored = {matrix: trained.matrix(offset)}
        if not (reads or scored[matrix]):
            return
        if offset == 1 and self.recipe.objective.token_order is not None:
            scored[-1] = trained.token_order
        distill, width = self.recipe.objective.distill, self.recipe.model.hidden_size
        size = draft_vocab_size(self.recipe) if offset > 1 else self.recipe.model.vocab_size
        if offset > 1 and distill is not None and distill.beta_of(offset):
            reads_main, learns = self.has_path[1] or trained.shared_norm(1), not distill.detach_teacher
            if self.recipe.heads.draft_vocabulary is not None and not self.num_teacher_scores:
                whole = self.recipe.model.vocab_size  # once: is the main head's choice one that can be drafted?
                self.teacher += product(whole * width, reads=False, is_trained=False)
                self.num_teacher_scores += whole
            self.teacher += product(size * width, reads=learns and reads_main, is_trained=learns and trained.matrix(1))
            self.num_compared += 1
            self.num_teacher_scores += size
            self.num_compared_entries += distill.resolved_top_k(size)
        for number, is_trained in scored.items():
            self.unembedding += product(size * width, reads=reads, is_trained=is_trained)
            self.scored.append(size)
            self.matrices |= {number} if is_trained else set()


class _Stack:
    """Transformer layers one after the other, all trained or all frozen, with low-rank updates or without."""

    def __init__(self, recipe: Recipe, *, is_trained: bool, is_updated: bool) -> None:
        self.model, self.is_trained = recipe.model, is_trained
        self.rank = recipe.adapt.lora.rank if recipe.adapt.lora else 0
        self.targets = adapted_targets(recipe) if is_updated else ()
        self.learns_updates = TrainableParts(recipe).updates
        self.widths = projection_widths(recipe.model)

    def run(self, num_layers: int, *, has_path: bool) -> tuple[MatmulCost, bool]:
        """Return the work, and whether the last state has a gradient path, given whether the first has."""
        work = MatmulCost()
        for _ in range(num_layers):
            layer, has_path = self._layer(has_path=has_path)
            work += layer
        return work, has_path

    def _layer(self, *, has_path: bool) -> tuple[MatmulCost, bool]:
        read = has_path or self.is_trained  # behind a norm, which is trained with the layer
        qkv, mixed = self._project(("q", "k", "v"), reads=read)
        output, written = self._project(("o",), reads=mixed)
        attended = has_path or written
        read = (has_path if self.model.parallel_residual else attended) or self.is_trained
        inner, combined = self._project(("gate", "up"), reads=read)
        down, written = self._project(("down",), reads=combined)
        return qkv + output + inner + down + MatmulCost(layers=1, layers_back=int(mixed)), attended or written

    def _project(self, names: Iterable[str], *, reads: bool) -> tuple[MatmulCost, bool]:
        """Run projections of one input; return whether any of their outputs has a gradient path."""
        work, has_path = MatmulCost(), reads or self.is_trained
        for name in names:
            if name not in self.widths:
                continue
            width_in, width_out = self.widths[name]
            work += product(width_in * width_out, reads=reads, is_trained=self.is_trained)
            if name in self.targets:
                learns = self.learns_updates
                work += product(self.rank * width_in, reads=reads, is_trained=learns)
                work += product(self.rank * width_out, reads=reads or learns, is_trained=learns)
                has_path = has_path or learns
        return work, has_path


def product(entries: int, *, reads: bool, is_trained: bool) -> MatmulCost:
    """Multiply by a matrix; `reads` says whether the gradient of what is multiplied is wanted.

    >>> product(10, reads=True, is_trained=False).entries
    20
    """
    return MatmulCost(forward=entries, inputs=entries * reads, weights=entries * is_trained)


def projection_widths(model: ModelSection) -> dict[str, tuple[int, int]]:
    """List the projections of a transformer layer with their widths, in and out.

    >>> shape = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    >>> model = ModelSection(mlp="gelu", **shape)
    >>> projection_widths(model)
    {'q': (8, 8), 'k': (8, 4), 'v': (8, 4), 'o': (8, 8), 'up': (8, 16), 'down': (16, 8)}
    """
    if model.is_foreign:  # all of a layer together, in place of the projection that is run first
        return {"q": (1, layer_weights(model).matrices)}
    width, inner = model.hidden_size, model.resolved_intermediate_size
    queries = model.num_attention_heads * model.resolved_head_dim
    keys = model.resolved_key_value_heads * model.resolved_head_dim
    gate = {"gate": (width, inner)} if model.mlp == "swiglu" else {}
    return {
        "q": (width, queries),
        "k": (width, keys),
        "v": (width, keys),
        "o": (queries, width),
        **gate,
        "up": (width, inner),
        "down": (inner, width),
    }
