"""Parameters of a recipe's model by role, and how many of them are trained."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from mtp_lightning.recipe.head_kinds import registered
from mtp_lightning.recipe.layer_counts import num_head_layers, num_trunk_layers
from mtp_lightning.recipe.schema.model import HeadsSection, ModelSection
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import TrainableParts, mixing_offsets

CHECKPOINT_BYTES = 14  # per parameter: fp32 weight and two moments, and what goes with them
ENTRY_BYTES = 4  # of a moment or an average
LARGEST_BUCKET = 500_000_000  # DeepSpeed's default for what is reduced together


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters: entries of matrices, which multiply a position, and of norms and biases, which do not."""

    matrices: int = 0
    vectors: int = 0
    sides: int = 0  # rows and columns of the matrices, added up: what Adafactor keeps of them

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.matrices + other.matrices, self.vectors + other.vectors, self.sides + other.sides)

    def __sub__(self, other: "Weights") -> "Weights":
        return self + -1 * other

    def __rmul__(self, times: int) -> "Weights":
        return Weights(times * self.matrices, times * self.vectors, times * self.sides)

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.vectors


def matrix(rows: int, columns: int) -> Weights:
    """Count one matrix.

    >>> matrix(3, 5)
    Weights(matrices=15, vectors=0, sides=8)
    """
    return Weights(matrices=rows * columns, sides=rows + columns)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by role; a tied matrix is the trunk's embedding."""

    trunk: int
    heads: int
    unembedding: int
    lora: int = 0
    layer_mix: int = 0

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return self.trunk + self.heads + self.unembedding + self.lora + self.layer_mix


@dataclass(frozen=True)
class DiskUse:
    """Room that the checkpoints of a run take at most."""

    num_checkpoints: int  # the newest, the best, those kept for ever, and the one being written
    bytes_each: int

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.num_checkpoints * self.bytes_each


def disk_use(recipe: Recipe) -> DiskUse:
    """Count checkpoints and their bytes.

    >>> disk_use(Recipe())
    DiskUse(num_checkpoints=4, bytes_each=91818496)
    """
    section = recipe.checkpoint
    permanent = recipe.run.steps // section.keep_every_steps if section.keep_every_steps else 0
    more = kept_entries(recipe) - 2 * trainable_parameters(recipe)
    each = CHECKPOINT_BYTES * parameter_counts(recipe).total + ENTRY_BYTES * more
    return DiskUse(section.keep + 2 + permanent, each)


def kept_state_bytes(recipe: Recipe) -> int:
    """Count what states of a frozen trunk take on disk where no row comes twice (`memory.cache_hidden_states`).

    >>> recipe = Recipe.model_validate({"freeze": ["trunk"], "memory": {"cache_hidden_states": "states"}})
    >>> kept_state_bytes(recipe) == 4096 * 1000 * 256 * 4
    True
    """
    if recipe.memory.cache_hidden_states is None:
        return 0
    is_fp32 = recipe.strategy.kind == "single" or recipe.run.precision == "fp32"  # autocast leaves the sums of layers
    positions = recipe.batch.samples_after(recipe.run.steps) * recipe.data.seq_len
    return positions * recipe.model.hidden_size * (4 if is_fp32 else 2)


def parameter_counts(recipe: Recipe) -> ParameterCounts:
    """Count the parameters that training updates and a checkpoint holds.

    >>> parameter_counts(Recipe())
    ParameterCounts(trunk=3279104, heads=3213312, unembedding=66048, lora=0, layer_mix=0)
    """
    if recipe.model.is_foreign:
        from mtp_lightning.model.foreign_counts import parameters_by_role

        return ParameterCounts(**{"heads": 0, "unembedding": 0, **parameters_by_role(recipe)})
    return ParameterCounts(**{role: weights.total for role, weights in _weights_by_role(recipe).items()})


def _weights_by_role(recipe: Recipe) -> dict[str, Weights]:
    return {
        "trunk": _vocabulary_matrix(recipe) + num_trunk_layers(recipe) * layer_weights(recipe.model),
        "heads": head_weights(recipe),
        "unembedding": unembedding_weights(recipe),
        "lora": update_weights(recipe),
        "layer_mix": Weights(vectors=len(mixing_offsets(recipe)) * num_trunk_layers(recipe)),
    }


def _vocabulary_matrix(recipe: Recipe) -> Weights:
    return matrix(recipe.model.vocab_size, recipe.model.hidden_size)


def trainable_parameters(recipe: Recipe) -> int:
    """Count the parameters that have gradients and optimizer state: all, or those that are not frozen.

    Of a number of offsets that are trained, those count that no frozen offset uses, and what an adaptation adds.

    >>> fields = {"heads": {"kind": "sequential", "layers_from_trunk": False}, "freeze": ["offsets_below_4"]}
    >>> trainable_parameters(Recipe.model_validate(fields))
    935168
    """
    parts, counts = TrainableParts(recipe), asdict(parameter_counts(recipe))
    if parts.first > 1:
        before = _before(recipe, parts.first)
        counts["heads"] -= head_weights(before).total
        counts["unembedding"] -= unembedding_weights(before).total
    return sum(count for role, count in counts.items() if role not in parts.frozen_roles)


def matrix_parameters(recipe: Recipe) -> int:
    """Count the trained parameters that Muon steps: matrices of layers in trunk and heads, no embeddings.

    >>> matrix_parameters(Recipe()), matrix_parameters(Recipe.model_validate({"optimizer": {"kind": "muon"}}))
    (0, 6422528)
    """
    if recipe.optimizer.kind != "muon":
        return 0
    if recipe.model.is_foreign:
        from mtp_lightning.model.foreign_counts import trained_matrices

        return trained_matrices(recipe)
    parts = TrainableParts(recipe)
    counts = {
        "trunk": num_trunk_layers(recipe) * layer_weights(recipe.model).matrices,
        "heads": head_weights(recipe).matrices,
    }
    if parts.first > 1:
        counts["heads"] -= head_weights(_before(recipe, parts.first)).matrices
    return sum(count for role, count in counts.items() if role not in parts.frozen_roles)


def factored_entries(recipe: Recipe) -> int:
    """Count Adafactor's state: rows and columns of every trained matrix, and all entries of trained vectors.

    >>> factored_entries(Recipe()), trainable_parameters(Recipe())
    (44802, 6558464)
    """
    if recipe.model.is_foreign or registered(recipe.heads.kind) is not None:
        from mtp_lightning.model.foreign_counts import trained_sides

        return trained_sides(recipe)
    parts, weights = TrainableParts(recipe), _weights_by_role(recipe)
    if parts.first > 1:
        before = _before(recipe, parts.first)
        weights["heads"] -= head_weights(before)
        weights["unembedding"] -= unembedding_weights(before)
    return sum(each.sides + each.vectors for role, each in weights.items() if role not in parts.frozen_roles)


def _before(recipe: Recipe, first: int) -> Recipe:
    """Return a recipe of the offsets before one."""
    return recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"num_offsets": first - 1})})


def kept_entries(recipe: Recipe) -> int:
    """Count what the optimizer keeps of the trained parameters, besides master weights: moments and averages.

    >>> kept_entries(Recipe()) == 2 * trainable_parameters(Recipe())
    True
    """
    averages = 0 if recipe.optimizer.ema is None else trainable_parameters(recipe)
    if recipe.optimizer.kind == "adafactor":
        return factored_entries(recipe) + averages
    return 2 * trainable_parameters(recipe) - matrix_parameters(recipe) + averages


def bucket_entries(recipe: Recipe) -> int:
    """Number of gradients that ranks reduce together: those of one head's layers and one unembedding matrix.

    So no rank holds more gradients than these unsharded under ZeRO-2 and 3; no more than DeepSpeed's default.

    >>> bucket_entries(Recipe())
    869120
    """
    head = recipe.heads.layers_per_head * layer_weights(recipe.model).total
    return min(LARGEST_BUCKET, head + recipe.model.vocab_size * recipe.model.hidden_size)


def layer_weights(model: ModelSection) -> Weights:
    """Count one transformer layer: four projections of attention, three of a SwiGLU or two of a GELU, two norms.

    Of a model of transformers' classes, the mean of its layers' matrices, of experts those that a position is sent to.

    >>> layer_weights(ModelSection(hidden_size=8, num_attention_heads=2, intermediate_size=16))
    Weights(matrices=640, vectors=16, sides=136)
    """
    if model.is_foreign:
        from mtp_lightning.model.foreign_counts import layer_entries

        entries = layer_entries(model)
        return Weights(matrices=sum(entries) // len(entries))
    queries = model.num_attention_heads * model.resolved_head_dim
    keys = model.resolved_key_value_heads * model.resolved_head_dim
    inner, width, num_inner = model.resolved_intermediate_size, model.hidden_size, 2 if model.mlp == "swiglu" else 1
    biases = (queries + 2 * keys if model.qkv_bias else 0) + (width if model.output_bias else 0)
    biases += num_inner * inner + width if model.mlp_bias else 0
    head_norms = 2 * model.resolved_head_dim if model.qk_norm else 0
    attention = 2 * matrix(queries, width) + 2 * matrix(keys, width)
    return (
        attention
        + (num_inner + 1) * matrix(inner, width)
        + Weights(vectors=2 * norm_vectors(model) + biases + head_norms)
    )


def update_weights(recipe: Recipe) -> Weights:
    """Count the low-rank updates of all layers."""
    lora = recipe.adapt.lora
    num_layers = num_trunk_layers(recipe) + (num_head_layers(recipe) if lora and lora.in_heads else 0)
    entries = update_weights_of_layer(recipe)
    sides = 0 if lora is None else entries // lora.rank + 2 * lora.rank * len(lora.targets)
    return num_layers * Weights(matrices=entries, sides=sides)


def update_weights_of_layer(recipe: Recipe) -> int:
    """Count the low-rank updates of one layer: rank x (width in + width out) each.

    >>> update_weights_of_layer(Recipe.model_validate({"adapt": {"lora": {"rank": 2, "targets": ["q"]}}}))
    1024
    """
    model, lora = recipe.model, recipe.adapt.lora
    queries = model.num_attention_heads * model.resolved_head_dim
    keys, inner = model.resolved_key_value_heads * model.resolved_head_dim, model.resolved_intermediate_size
    other_side = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": inner, "up": inner, "down": inner}
    return lora.rank * sum(model.hidden_size + other_side[target] for target in lora.targets) if lora else 0


def norm_vectors(model: ModelSection) -> int:
    """Count the parameters of one norm of width D."""
    return (2 if model.norm == "layer" else 1) * model.hidden_size


def head_weights(recipe: Recipe) -> Weights:
    """Count what all heads together hold."""
    if (own := registered(recipe.heads.kind)) is not None:
        offsets = range(1, recipe.heads.num_offsets + 1)
        parts = [Weights(*own.weights_beside_layers(recipe.model, recipe.heads, offset)) for offset in offsets]
        besides = sum(parts, Weights())
    else:
        besides = BESIDES_LAYERS[recipe.heads.kind](recipe.model, recipe.heads)
    return num_head_layers(recipe) * layer_weights(recipe.model) + besides


def unembedding_weights(recipe: Recipe) -> Weights:
    """Count the final norms and the V x D matrices; a tied matrix is counted with the trunk."""
    heads = recipe.heads
    num_matrices = heads.num_offsets if heads.unembedding == "replicated" else 1
    num_matrices += (1 if recipe.objective.token_order else 0) - (1 if recipe.model.tie_word_embeddings else 0)
    num_norms = {"sequential": heads.num_offsets, "recursive": min(2, heads.num_offsets)}.get(heads.kind, 1)
    return num_matrices * _vocabulary_matrix(recipe) + num_norms * Weights(vectors=norm_vectors(recipe.model))


def _modules(model: ModelSection, num_modules: int) -> Weights:
    """Projection from 2D to D and two norms of each sequential module."""
    return num_modules * (matrix(model.hidden_size, 2 * model.hidden_size) + Weights(vectors=2 * norm_vectors(model)))


BESIDES_LAYERS: dict[str, Callable[[ModelSection, HeadsSection], Weights]] = {
    "parallel": lambda model, heads: Weights(),
    "chained": lambda model, heads: Weights(),
    "linear": lambda model, heads: (heads.num_offsets - 1) * matrix(model.hidden_size, model.hidden_size),
    "medusa": lambda model, heads: (
        ((heads.num_offsets - 1) * heads.layers_per_head)
        * (matrix(model.hidden_size, model.hidden_size) + Weights(vectors=model.hidden_size))
    ),
    "sequential": lambda model, heads: _modules(model, heads.num_offsets - 1),
    "recursive": lambda model, heads: _modules(model, min(1, heads.num_offsets - 1)),
}
"""What the heads of each kind hold besides transformer layers, from the recipe's sections."""
