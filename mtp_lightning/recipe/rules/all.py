"""What must hold between the fields of a recipe, as one table."""

from collections.abc import Collection, Mapping
from typing import Any

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.layer_counts import num_layers_from_trunk, num_trunk_layers
from mtp_lightning.recipe.rules.adapt import ADAPT_RULES
from mtp_lightning.recipe.rules.base import Rule, divisors, value_at
from mtp_lightning.recipe.rules.data import DATA_RULES
from mtp_lightning.recipe.rules.model import MODEL_RULES
from mtp_lightning.recipe.rules.paths import PATH_RULES
from mtp_lightning.recipe.rules.strategy import STRATEGY_RULES
from mtp_lightning.recipe.schema.base import Section
from mtp_lightning.recipe.schema.data import MIXTURE_BLOCK_ROWS
from mtp_lightning.recipe.schema.describe import nearest, one_of
from mtp_lightning.recipe.schema.objective import ConstantWeights, LambdaWeights
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.yaml import one_line_yaml

KNOWN_TOKENIZERS = ("byte",)
TOKENIZER_FILES = (".json", ".model")
LARGEST_SEED = 2**32 - 1


def check_rules(
    recipe: Recipe, *, origins: Mapping[str, str] | None = None, suspects: Collection[str] = ()
) -> list[Fault]:
    """Return a fault for each rule that a recipe breaks; rules that read a field among `suspects` are passed over.

    >>> recipe = Recipe.model_validate({"data": {"window_tokens": 4}})
    >>> [fault.must_hold for fault in check_rules(recipe)]
    ['must exceed heads.num_offsets (T > n)']
    """
    return [
        _fault_from(rule, recipe, origins or {})
        for rule in RULES
        if not any(_touches(field, suspect) for field in rule.fields for suspect in suspects) and not rule.holds(recipe)
    ]


def _touches(field: str, suspect: str) -> bool:
    return f"{field}.".startswith(f"{suspect}.") or f"{suspect}.".startswith(f"{field}.")


def _fault_from(rule: Rule, recipe: Recipe, origins: Mapping[str, str]) -> Fault:
    values = {field: _plain(value_at(recipe, field)) for field in rule.fields}
    written = dict.fromkeys(origins.get(field, "default") for field in rule.fields)
    several = ", ".join(f"{field} = {one_line_yaml(value)}" for field, value in values.items())
    return Fault(
        path=rule.fields[0],
        must_hold=rule.must_hold,
        found=several if len(values) > 1 else one_line_yaml(values[rule.fields[0]]),
        origin=", ".join(origin for origin in written if origin != "default") or "default",
        nearest=nearest(recipe.data.tokenizer, KNOWN_TOKENIZERS) if rule.fields == ("data.tokenizer",) else None,
        remedy=rule.remedy if isinstance(rule.remedy, str) else rule.remedy(recipe),
    )


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Section) else value


def _numbers_of_heads(width: int) -> str:
    """List the numbers of heads that give each an even width."""
    return divisors(width // 2) if width % 2 == 0 else "another number"


def _has_whole_head_width(recipe: Recipe) -> bool:
    return recipe.model.head_width is not None or recipe.model.width % recipe.model.num_attention_heads == 0


def _weights_fit(recipe: Recipe) -> bool:
    weights = recipe.objective.weights
    values = weights.values if isinstance(weights, ConstantWeights) else None
    return values is None or len(values) == recipe.heads.num_offsets


def _main_head_learns(recipe: Recipe) -> bool:
    weights = recipe.objective.weights
    return not (isinstance(weights, ConstantWeights) and weights.values) or weights.values[0] > 0


def _trained_offset_learns(recipe: Recipe) -> bool:
    """Check that a run which trains some heads only gives one of them a loss."""
    first, weights = recipe.heads.trainable_from, recipe.objective.weights
    if first is None:
        return True
    if isinstance(weights, ConstantWeights):
        return weights.values is None or any(weights.values[first - 1 :])
    return not (isinstance(weights, LambdaWeights) and weights.start == weights.end == 0)


def _distills_every_offset(recipe: Recipe) -> bool:
    """Check that every extra offset has something to learn from; wrong numbers of weights are another fault."""
    distill = recipe.objective.distill
    if distill is None or not _fits_extras(recipe, "alpha") or not _fits_extras(recipe, "beta"):
        return True
    return all(distill.alpha_of(k) + distill.beta_of(k) > 0 for k in range(2, recipe.heads.num_offsets + 1))


def _fits_extras(recipe: Recipe, name: str) -> bool:
    distill = recipe.objective.distill
    return distill is None or len(getattr(distill, name)) in (1, recipe.heads.num_offsets - 1)


def _top_k_fits(recipe: Recipe) -> bool:
    distill = recipe.objective.distill
    return distill is None or (distill.top_k or 0) <= recipe.model.vocabulary


def _is_separable(recipe: Recipe) -> bool:
    """Check that no frozen offset depends on a trained one, nor shares a module with it."""
    heads = recipe.heads
    return (heads.kind, heads.order) != ("chained", "anticausal") and not (
        heads.kind == "recursive" and (heads.trainable_from or 2) > 2
    )


def _interval_is_forward(recipe: Recipe) -> bool:
    weights = recipe.objective.weights
    if not isinstance(weights, LambdaWeights) or weights.change == "step":
        return True
    return weights.begins_at < weights.ends_at


def _layers_remedy(recipe: Recipe) -> str:
    taken = num_layers_from_trunk(recipe)
    return (
        f"The heads take {taken} of {recipe.model.num_layers} layers: raise model.num_layers to {taken + 1} or more, "
        "lower heads.num_offsets, or set heads.match_parameters=false."
    )


def _is_tokenizer(name: str) -> bool:
    return name in KNOWN_TOKENIZERS or name.endswith(TOKENIZER_FILES)


def _weights_are_near(recipe: Recipe) -> bool:
    """Check that each source gets a row or more of a block of the mixture."""
    weights = recipe.data.mixture.values()
    return all(weight * MIXTURE_BLOCK_ROWS >= sum(weights) for weight in weights)


def _needs_kind(field: str, default: Any, *kinds: str) -> Rule:
    """Build the rule that a field which only some head kinds read keeps its default elsewhere."""
    return Rule(
        fields=(field, "heads.kind"),
        holds=lambda recipe: recipe.heads.kind in kinds or value_at(recipe, field) == default,
        must_hold=f"must stay {default}: only {one_of(kinds, 'and')} heads read it",
        remedy=f"Remove {field}, or choose another heads.kind.",
    )


def _needs_start(field: str) -> Rule:
    """Build the rule that a field is left alone by a run that starts from nothing."""
    return Rule(
        fields=(field, "run.start_from"),
        holds=lambda recipe: not value_at(recipe, field) or recipe.run.start_from is not None,
        must_hold="must be left out without run.start_from: there is nothing to take it from",
        remedy=f"Give run.start_from, or remove {field}.",
    )


RULES: tuple[Rule, ...] = (
    Rule(
        fields=("model.width", "model.num_attention_heads"),
        holds=_has_whole_head_width,
        must_hold="must be divisible by model.num_attention_heads when model.head_width is null",
        remedy=lambda recipe: (
            f"Set model.num_attention_heads to {_numbers_of_heads(recipe.model.width)}, "
            "change model.width, or give model.head_width."
        ),
    ),
    Rule(
        fields=("model.num_attention_heads", "model.num_key_value_heads"),
        holds=lambda recipe: recipe.model.num_attention_heads % recipe.model.resolved_key_value_heads == 0,
        must_hold="must be divisible by model.num_key_value_heads",
        remedy=lambda recipe: f"Set model.num_key_value_heads to {divisors(recipe.model.num_attention_heads)}.",
    ),
    Rule(
        fields=("model.head_width", "model.width", "model.num_attention_heads"),
        holds=lambda recipe: not _has_whole_head_width(recipe) or recipe.model.resolved_head_width % 2 == 0,
        must_hold="must be even: rotary positions turn pairs of channels",
        remedy=lambda recipe: (
            f"One head is {recipe.model.resolved_head_width} wide: give an even model.head_width, "
            "or change model.width."
        ),
    ),
    Rule(
        fields=(
            "model.num_layers",
            "heads.num_offsets",
            "heads.kind",
            "heads.layers_per_head",
            "heads.match_parameters",
        ),
        holds=lambda recipe: num_trunk_layers(recipe) >= 1,
        must_hold="must leave at least one layer to the trunk",
        remedy=_layers_remedy,
    ),
    _needs_kind("heads.order", "causal", "chained"),
    _needs_kind("heads.hidden", "post_norm", "sequential", "recursive"),
    _needs_kind("heads.concatenation", "embedding_first", "sequential", "recursive"),
    _needs_kind("heads.layers_per_head", 1, "parallel", "chained", "sequential", "recursive", "medusa"),
    Rule(
        fields=("heads.isolate_trunk", "heads.kind", "heads.order"),
        holds=lambda recipe: (
            not (recipe.heads.isolate_trunk and (recipe.heads.kind, recipe.heads.order) == ("chained", "anticausal"))
        ),
        must_hold="must be false for an anticausal chain, whose main head reads the other heads",
        remedy="Set heads.order=causal, or heads.isolate_trunk=false.",
    ),
    Rule(
        fields=("heads.trainable_from", "heads.num_offsets"),
        holds=lambda recipe: (recipe.heads.trainable_from or 0) <= recipe.heads.num_offsets,
        must_hold="must be one of the offsets, or nothing trains",
        remedy=lambda recipe: f"Set heads.trainable_from to {recipe.heads.num_offsets} or less, or to null.",
    ),
    Rule(
        fields=("heads.trainable_from", "objective.weights"),
        holds=_trained_offset_learns,
        must_hold="must leave an offset that is trained and whose loss counts",
        remedy="Give an offset from heads.trainable_from on a weight above 0.",
    ),
    Rule(
        fields=("heads.trainable_from", "heads.kind", "heads.order"),
        holds=lambda recipe: recipe.heads.trainable_from is None or _is_separable(recipe),
        must_hold="must be null for an anticausal chain, at most 2 for recursive heads: frozen offsets would change",
        remedy="Set heads.trainable_from=null, or choose another heads.kind.",
    ),
    Rule(
        fields=("heads.trainable_from", "objective.token_order.weight"),
        holds=lambda recipe: recipe.heads.trainable_from is None or recipe.objective.token_order is None,
        must_hold="must be null with objective.token_order, a loss of the main head",
        remedy="Set objective.token_order=null.",
    ),
    Rule(
        fields=("heads.unembedding", "model.tie_embeddings"),
        holds=lambda recipe: not (recipe.heads.unembedding == "replicated" and recipe.model.tie_embeddings),
        must_hold="must be shared when model.tie_embeddings is true: one embedding cannot be n matrices",
        remedy="Set heads.unembedding=shared, or model.tie_embeddings=false.",
    ),
    Rule(
        fields=("heads.unembedding", "heads.kind"),
        holds=lambda recipe: (
            not (recipe.heads.unembedding == "replicated" and recipe.heads.kind in ("sequential", "recursive"))
        ),
        must_hold="must be shared for sequential and recursive modules",
        remedy="Set heads.unembedding=shared.",
    ),
    Rule(
        fields=("objective.weights.values", "heads.num_offsets"),
        holds=_weights_fit,
        must_hold="must hold one weight per offset",
        remedy=lambda recipe: f"Give {recipe.heads.num_offsets} weights, or null for 1 each.",
    ),
    Rule(
        fields=("objective.weights.values",),
        holds=_main_head_learns,
        must_hold="must give the main head, which comes first, a weight above 0",
        remedy="Raise the first weight.",
    ),
    Rule(
        fields=("objective.weights.begins_at", "objective.weights.ends_at"),
        holds=_interval_is_forward,
        must_hold="must lie before objective.weights.ends_at",
        remedy="Lower objective.weights.begins_at, or set objective.weights.change=step.",
    ),
    Rule(
        fields=("heads.num_offsets", "objective.distill.beta"),
        holds=lambda recipe: recipe.objective.distill is None or recipe.heads.num_offsets > 1,
        must_hold="must be 2 or more with objective.distill: the main head is the teacher",
        remedy="Raise heads.num_offsets, or set objective.distill=null.",
    ),
    Rule(
        fields=("objective.distill.alpha", "heads.num_offsets"),
        holds=lambda recipe: _fits_extras(recipe, "alpha"),
        must_hold="must hold one weight for all extra offsets, or one for each",
        remedy=lambda recipe: f"Give 1 weight or {recipe.heads.num_offsets - 1}.",
    ),
    Rule(
        fields=("objective.distill.beta", "heads.num_offsets"),
        holds=lambda recipe: _fits_extras(recipe, "beta"),
        must_hold="must hold one weight for all extra offsets, or one for each",
        remedy=lambda recipe: f"Give 1 weight or {recipe.heads.num_offsets - 1}.",
    ),
    Rule(
        fields=("objective.distill.beta", "objective.distill.alpha"),
        holds=_distills_every_offset,
        must_hold="must be above 0 where objective.distill.alpha is 0, or an offset learns nothing",
        remedy="Raise one of the two.",
    ),
    Rule(
        fields=("objective.distill.top_k", "model.vocabulary"),
        holds=_top_k_fits,
        must_hold="must not exceed model.vocabulary",
        remedy="Lower objective.distill.top_k, or set it to null for as many as there are, 10,000 at most.",
    ),
    Rule(
        fields=("objective.balance", "objective.distill.beta"),
        holds=lambda recipe: recipe.objective.balance == "none" or recipe.objective.distill is None,
        must_hold="must be none with objective.distill, whose alpha and beta weigh the losses",
        remedy="Set objective.balance=none, or objective.distill=null.",
    ),
    Rule(
        fields=("data.tokenizer",),
        holds=lambda recipe: _is_tokenizer(recipe.data.tokenizer),
        must_hold=f"must be {one_of(KNOWN_TOKENIZERS)}, or a file that ends in {one_of(TOKENIZER_FILES)}",
        remedy=f"Set data.tokenizer={KNOWN_TOKENIZERS[0]}, or give the path of a tokenizer.json.",
    ),
    Rule(
        fields=("data.end_of_document", "data.tokenizer"),
        holds=lambda recipe: recipe.data.tokenizer not in KNOWN_TOKENIZERS or recipe.data.end_of_document is None,
        must_hold="must be null unless data.tokenizer is a file",
        remedy="Remove data.end_of_document.",
    ),
    Rule(
        fields=("data.mixture", "data.shards"),
        holds=lambda recipe: not recipe.data.mixture or recipe.data.shards is None,
        must_hold="must be empty when data.shards names a folder",
        remedy="Remove data.shards, or give its folder a weight in data.mixture.",
    ),
    Rule(
        fields=("data.mixture",),
        holds=_weights_are_near,
        must_hold=f"must give every source at least 1 of {MIXTURE_BLOCK_ROWS} rows",
        remedy="Raise the smallest weight, or leave the source out.",
    ),
    Rule(
        fields=("data.mixture_epochs", "data.mixture"),
        holds=lambda recipe: recipe.data.mixture_epochs.keys() <= recipe.data.mixture.keys(),
        must_hold="must name sources of data.mixture only",
        remedy="Spell the sources as in data.mixture.",
    ),
    Rule(
        fields=("data.window_tokens", "heads.num_offsets"),
        holds=lambda recipe: recipe.data.window_tokens > recipe.heads.num_offsets,
        must_hold="must exceed heads.num_offsets (T > n)",
        remedy="Raise data.window_tokens, or lower heads.num_offsets.",
    ),
    Rule(
        fields=("data.window_tokens", "model.max_positions"),
        holds=lambda recipe: recipe.data.window_tokens <= recipe.model.max_positions,
        must_hold="must not exceed model.max_positions",
        remedy="Lower data.window_tokens, or raise model.max_positions.",
    ),
    Rule(
        fields=("batch.micro_rows", "batch.rows"),
        holds=lambda recipe: recipe.batch.rows % recipe.batch.micro_rows == 0,
        must_hold="must divide batch.rows",
        remedy=lambda recipe: f"Set batch.micro_rows to {divisors(recipe.batch.rows)}.",
    ),
    Rule(
        fields=("optimizer.betas",),
        holds=lambda recipe: all(0 <= beta < 1 for beta in recipe.optimizer.betas),
        must_hold="must each be >= 0 and < 1",
        remedy="Choose decay rates such as [0.9, 0.95].",
    ),
    Rule(
        fields=("run.guard.rows", "run.start_from"),
        holds=lambda recipe: (
            recipe.run.guard in ("auto", None) or recipe.run.start_from is not None or recipe.phases != {}
        ),
        must_hold="must be left out without run.start_from: there is no model to compare the main head with",
        remedy="Give run.start_from, or set run.guard=null.",
    ),
    *(_needs_start(field) for field in ("run.keep_optimizer", "run.keep_position", "heads.extend")),
    Rule(
        fields=("run.seed",),
        holds=lambda recipe: recipe.run.seed <= LARGEST_SEED,
        must_hold=f"must be at most {LARGEST_SEED}",
        remedy="Choose a smaller seed.",
    ),
    *MODEL_RULES,
    *ADAPT_RULES,
    *DATA_RULES,
    *STRATEGY_RULES,
    *PATH_RULES,
)
