"""What must hold between the fields of a recipe, as one table."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mtp_lightning.errors import Fault
from mtp_lightning.files.paths import leads_to
from mtp_lightning.recipe.head_kinds import registered
from mtp_lightning.recipe.layer_counts import num_layers_from_trunk, num_trunk_layers
from mtp_lightning.recipe.rules.adapt import ADAPT_RULES
from mtp_lightning.recipe.rules.base import Rule, divisors, value_at
from mtp_lightning.recipe.rules.data import DATA_RULES, MODEL_RULES
from mtp_lightning.recipe.rules.deepspeed import check_deepspeed
from mtp_lightning.recipe.rules.draft_vocabulary import DRAFT_RULES
from mtp_lightning.recipe.rules.foreign import FOREIGN_RULES
from mtp_lightning.recipe.rules.memory import MEMORY_RULES
from mtp_lightning.recipe.rules.optimizer import OPTIMIZER_RULES, check_schedule
from mtp_lightning.recipe.rules.paths import PATH_RULES
from mtp_lightning.recipe.rules.rollout import ROLLOUT_RULES
from mtp_lightning.recipe.rules.sequence_parallel import SEQUENCE_PARALLEL_RULES
from mtp_lightning.recipe.rules.strategy import STRATEGY_RULES
from mtp_lightning.recipe.schema.base import Section
from mtp_lightning.recipe.schema.data import MIXTURE_BLOCK_ROWS
from mtp_lightning.recipe.schema.describe import nearest, one_of, shortened
from mtp_lightning.recipe.schema.objective import ConstantWeights, LambdaWeights
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.yaml import one_line_yaml

KNOWN_TOKENIZERS = ("byte",)
TOKENIZER_FILES = (".json", ".model")


def check_rules(
    recipe: Recipe, *, origins: Mapping[str, str] | None = None, suspects: Collection[str] = ()
) -> list[Fault]:
    """Return a fault for each rule that a recipe breaks; rules that read a field among `suspects` are passed over.

    >>> recipe = Recipe.model_validate({"data": {"seq_len": 4}})
    >>> [fault.expected for fault in check_rules(recipe)]
    ['must exceed heads.num_offsets (T > n)']
    """
    broken = [
        _fault_from(rule, recipe, origins or {})
        for rule in RULES
        if not any(_touches(field, suspect) for field in rule.fields for suspect in suspects) and not rule.holds(recipe)
    ]
    return [*broken, *check_schedule(recipe, origins or {}), *check_deepspeed(recipe, origins or {})]


def _touches(field: str, suspect: str) -> bool:
    return _is_in(field, suspect) or _is_in(suspect, field)


def _is_in(field: str, section: str) -> bool:
    return f"{field}.".startswith(f"{section}.")


def _fault_from(rule: Rule, recipe: Recipe, origins: Mapping[str, str]) -> Fault:
    values = {field: _plain(value_at(recipe, field)) for field in rule.fields}
    written = dict.fromkeys(origins[path] for field in rule.fields for path in origins if _is_in(path, field))
    several = ", ".join(f"{field} = {one_line_yaml(value)}" for field, value in values.items())
    return Fault(
        path=rule.fields[0],
        expected=rule.expected,
        found=several if len(values) > 1 else shortened(one_line_yaml(values[rule.fields[0]])),
        origin=", ".join(origin for origin in written if origin != "default") or "default",
        nearest=nearest(recipe.data.tokenizer, KNOWN_TOKENIZERS) if rule.fields == ("data.tokenizer",) else None,
        hint=rule.hint if isinstance(rule.hint, str) else rule.hint(recipe),
    )


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Section) else value


def _numbers_of_heads(width: int) -> str:
    """List the numbers of heads that give each an even width."""
    return divisors(width // 2) if width % 2 == 0 else "another number"


def _has_whole_head_width(recipe: Recipe) -> bool:
    model = recipe.model
    return model.is_foreign or model.head_dim is not None or model.hidden_size % model.num_attention_heads == 0


def _weights_fit(recipe: Recipe) -> bool:
    weights = recipe.objective.weights
    values = weights.values if isinstance(weights, ConstantWeights) else None
    return values is None or len(values) == recipe.heads.num_offsets


def _main_head_learns(recipe: Recipe) -> bool:
    weights = recipe.objective.weights
    return not (isinstance(weights, ConstantWeights) and weights.values) or weights.values[0] > 0


def _trained_offset_learns(recipe: Recipe) -> bool:
    """Check that a run which trains some heads only gives one of them a loss."""
    first, weights = recipe.first_trained_offset, recipe.objective.weights
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
    return distill is None or not distill.exceeds(recipe.model.vocab_size)


def _is_separable(recipe: Recipe) -> bool:
    """Check that no frozen offset depends on a trained one, nor shares a module with it."""
    heads, first = recipe.heads, recipe.first_trained_offset
    return (heads.kind, heads.order) != ("chained", "anticausal") and not (
        heads.kind == "recursive" and (first or 2) > 2
    )


def _interval_is_forward(recipe: Recipe) -> bool:
    weights = recipe.objective.weights
    if not isinstance(weights, LambdaWeights) or weights.change == "step":
        return True
    return weights.begins_at < weights.ends_at


def _layers_remedy(recipe: Recipe) -> str:
    taken = num_layers_from_trunk(recipe)
    return (
        f"The heads take {taken} of {recipe.model.num_hidden_layers} layers: raise "
        f"model.num_hidden_layers to {taken + 1} or more, "
        "lower heads.num_offsets, or set heads.layers_from_trunk=false."
    )


def _is_tokenizer(name: str) -> bool:
    is_folder = "/" in name or leads_to(Path(name), Path.is_dir)
    return name in KNOWN_TOKENIZERS or name.endswith(TOKENIZER_FILES) or is_folder


def _weights_are_near(recipe: Recipe) -> bool:
    """Check that each source gets a row or more of a block of the mixture."""
    weights = [own[-1] for own in recipe.data.weights_at_rows().values() if own]
    return all(weight * MIXTURE_BLOCK_ROWS >= sum(weights) for weight in weights if weight)


def _needs_kind(field: str, default: Any, *kinds: str) -> Rule:
    """Build the rule that a field which only some head kinds read keeps its default elsewhere."""
    return Rule(
        fields=(field, "heads.kind"),
        holds=lambda recipe: (
            recipe.heads.kind in kinds or bool(registered(recipe.heads.kind)) or value_at(recipe, field) == default
        ),
        expected=f"must stay {default}: only {one_of(kinds, 'and')} heads read it",
        hint=f"Remove {field}, or choose another heads.kind.",
    )


RULES: tuple[Rule, ...] = (
    Rule(
        fields=("model.hidden_size", "model.num_attention_heads"),
        holds=_has_whole_head_width,
        expected="must be divisible by model.num_attention_heads when model.head_dim is null",
        hint=lambda recipe: (
            f"Set model.num_attention_heads to {_numbers_of_heads(recipe.model.hidden_size)}, "
            "change model.hidden_size, or give model.head_dim."
        ),
    ),
    Rule(
        fields=("model.num_attention_heads", "model.num_key_value_heads"),
        holds=lambda recipe: (
            recipe.model.is_foreign or recipe.model.num_attention_heads % recipe.model.resolved_key_value_heads == 0
        ),
        expected="must be divisible by model.num_key_value_heads",
        hint=lambda recipe: f"Set model.num_key_value_heads to {divisors(recipe.model.num_attention_heads)}.",
    ),
    Rule(
        fields=("model.head_dim", "model.hidden_size", "model.num_attention_heads"),
        holds=lambda recipe: (
            recipe.model.is_foreign or not _has_whole_head_width(recipe) or recipe.model.resolved_head_dim % 2 == 0
        ),
        expected="must be even: rotary positions turn pairs of channels",
        hint=lambda recipe: (
            f"One head is {recipe.model.resolved_head_dim} wide: give an even model.head_dim, "
            "or change model.hidden_size."
        ),
    ),
    Rule(
        fields=(
            "model.num_hidden_layers",
            "heads.num_offsets",
            "heads.kind",
            "heads.layers_per_head",
            "heads.layers_from_trunk",
        ),
        holds=lambda recipe: num_trunk_layers(recipe) >= 1,
        expected="must leave at least one layer to the trunk",
        hint=_layers_remedy,
    ),
    _needs_kind("heads.order", "causal", "chained"),
    _needs_kind("heads.hidden", "post_norm", "sequential", "recursive"),
    _needs_kind("heads.concatenation", "embedding_first", "sequential", "recursive"),
    _needs_kind("heads.layers_per_head", 1, "parallel", "chained", "sequential", "recursive", "medusa"),
    Rule(
        fields=("heads.detach_trunk", "heads.kind", "heads.order"),
        holds=lambda recipe: (
            not (recipe.heads.detach_trunk and (recipe.heads.kind, recipe.heads.order) == ("chained", "anticausal"))
        ),
        expected="must be false for an anticausal chain, whose main head reads the other heads",
        hint="Set heads.order=causal, or heads.detach_trunk=false.",
    ),
    Rule(
        fields=("freeze", "heads.num_offsets"),
        holds=lambda recipe: 2 <= (recipe.first_trained_offset or 2) <= max(recipe.heads.num_offsets, 2),
        expected="must name in offsets_below_K one of the extra offsets, or nothing is trained",
        hint=lambda recipe: f"Choose K from 2 to {recipe.heads.num_offsets}, or remove offsets_below_K.",
    ),
    Rule(
        fields=("freeze", "objective.weights"),
        holds=_trained_offset_learns,
        expected="must leave an offset that is trained and whose loss counts",
        hint="Give an offset that is not frozen a weight above 0.",
    ),
    Rule(
        fields=("freeze", "heads.kind", "heads.order"),
        holds=lambda recipe: recipe.first_trained_offset is None or _is_separable(recipe),
        expected="must not hold offsets_below_K for an anticausal chain, nor K > 2 for recursive heads: frozen offsets "
        "would change",
        hint="Remove offsets_below_K from freeze, or choose another heads.kind.",
    ),
    Rule(
        fields=("freeze", "objective.token_order.weight"),
        holds=lambda recipe: recipe.first_trained_offset is None or recipe.objective.token_order is None,
        expected="must not hold offsets_below_K with objective.token_order, a loss of the main head",
        hint="Set objective.token_order=null.",
    ),
    Rule(
        fields=("heads.unembedding", "model.tie_word_embeddings"),
        holds=lambda recipe: not (recipe.heads.unembedding == "replicated" and recipe.model.tie_word_embeddings),
        expected="must be shared when model.tie_word_embeddings is true: one embedding cannot be n matrices",
        hint="Set heads.unembedding=shared, or model.tie_word_embeddings=false.",
    ),
    Rule(
        fields=("heads.unembedding", "heads.kind"),
        holds=lambda recipe: (
            not (recipe.heads.unembedding == "replicated" and recipe.heads.kind in ("sequential", "recursive"))
        ),
        expected="must be shared for sequential and recursive modules",
        hint="Set heads.unembedding=shared.",
    ),
    Rule(
        fields=("objective.weights.values", "heads.num_offsets"),
        holds=_weights_fit,
        expected="must hold one weight per offset",
        hint=lambda recipe: f"Give {recipe.heads.num_offsets} weights, or null for 1 each.",
    ),
    Rule(
        fields=("objective.weights.values",),
        holds=_main_head_learns,
        expected="must give the main head, which comes first, a weight above 0",
        hint="Raise the first weight.",
    ),
    Rule(
        fields=("objective.weights.begins_at", "objective.weights.ends_at"),
        holds=_interval_is_forward,
        expected="must lie before objective.weights.ends_at",
        hint="Lower objective.weights.begins_at, or set objective.weights.change=step.",
    ),
    Rule(
        fields=("heads.num_offsets", "objective.distill.beta"),
        holds=lambda recipe: recipe.objective.distill is None or recipe.heads.num_offsets > 1,
        expected="must be 2 or more with objective.distill: the main head is the teacher",
        hint="Raise heads.num_offsets, or set objective.distill=null.",
    ),
    Rule(
        fields=("objective.distill.alpha", "heads.num_offsets"),
        holds=lambda recipe: _fits_extras(recipe, "alpha"),
        expected="must hold one weight for all extra offsets, or one for each",
        hint=lambda recipe: f"Give 1 weight or {recipe.heads.num_offsets - 1}.",
    ),
    Rule(
        fields=("objective.distill.beta", "heads.num_offsets"),
        holds=lambda recipe: _fits_extras(recipe, "beta"),
        expected="must hold one weight for all extra offsets, or one for each",
        hint=lambda recipe: f"Give 1 weight or {recipe.heads.num_offsets - 1}.",
    ),
    Rule(
        fields=("objective.distill.beta", "objective.distill.alpha"),
        holds=_distills_every_offset,
        expected="must be above 0 where objective.distill.alpha is 0, or an offset learns nothing",
        hint="Raise one of the two.",
    ),
    Rule(
        fields=("objective.distill.top_k", "model.vocab_size"),
        holds=_top_k_fits,
        expected="must not exceed model.vocab_size",
        hint="Lower objective.distill.top_k, or set it to all, or to null for 10,000 at most.",
    ),
    Rule(
        fields=("objective.balance", "objective.distill.beta"),
        holds=lambda recipe: recipe.objective.balance == "none" or recipe.objective.distill is None,
        expected="must be none with objective.distill, whose alpha and beta weigh the losses",
        hint="Set objective.balance=none, or objective.distill=null.",
    ),
    Rule(
        fields=("data.tokenizer",),
        holds=lambda recipe: _is_tokenizer(recipe.data.tokenizer),
        expected=f"must be {one_of(KNOWN_TOKENIZERS)}, a folder, or a file that ends in {one_of(TOKENIZER_FILES)}",
        hint=f"Set data.tokenizer={KNOWN_TOKENIZERS[0]}, or give the path of a tokenizer.json or of its folder.",
    ),
    Rule(
        fields=("data.end_of_document", "data.tokenizer"),
        holds=lambda recipe: recipe.data.tokenizer not in KNOWN_TOKENIZERS or recipe.data.end_of_document is None,
        expected="must be null unless data.tokenizer is a file",
        hint="Remove data.end_of_document.",
    ),
    Rule(
        fields=("data.parse_special_tokens", "data.add_special_tokens", "data.tokenizer"),
        holds=lambda recipe: (
            not (recipe.data.parse_special_tokens or recipe.data.add_special_tokens)
            or not recipe.data.tokenizer.endswith((*KNOWN_TOKENIZERS, ".model"))
        ),
        expected="must be false unless data.tokenizer is a tokenizer.json or its folder",
        hint="Remove them, or give a tokenizer.json.",
    ),
    Rule(
        fields=("data.mixture", "data.shards"),
        holds=lambda recipe: not recipe.data.mixture or recipe.data.shards is None,
        expected="must be empty when data.shards names a folder",
        hint="Remove data.shards, or give its folder a weight in data.mixture.",
    ),
    Rule(
        fields=("data.mixture",),
        holds=_weights_are_near,
        expected=f"must give every source at least 1 of {MIXTURE_BLOCK_ROWS} rows, or none by data.mixture_schedule",
        hint="Raise the smallest weight, or leave the source out.",
    ),
    Rule(
        fields=("data.max_epochs", "data.mixture"),
        holds=lambda recipe: recipe.data.max_epochs.keys() <= recipe.data.mixture.keys(),
        expected="must name sources of data.mixture only",
        hint="Spell the sources as in data.mixture.",
    ),
    Rule(
        fields=("data.seq_len", "heads.num_offsets"),
        holds=lambda recipe: recipe.data.seq_len > recipe.heads.num_offsets,
        expected="must exceed heads.num_offsets (T > n)",
        hint="Raise data.seq_len, or lower heads.num_offsets.",
    ),
    Rule(
        fields=("data.seq_len", "model.max_position_embeddings"),
        holds=lambda recipe: recipe.data.seq_len <= recipe.model.max_position_embeddings,
        expected="must not exceed model.max_position_embeddings",
        hint="Lower data.seq_len, or raise model.max_position_embeddings.",
    ),
    Rule(
        fields=("batch.micro_batch_size", "batch.global_batch_size"),
        holds=lambda recipe: recipe.batch.global_batch_size % recipe.batch.micro_batch_size == 0,
        expected="must divide batch.global_batch_size",
        hint=lambda recipe: f"Set batch.micro_batch_size to {divisors(recipe.batch.global_batch_size)}.",
    ),
    *MEMORY_RULES,
    *OPTIMIZER_RULES,
    *ROLLOUT_RULES,
    *MODEL_RULES,
    *FOREIGN_RULES,
    *ADAPT_RULES,
    *DRAFT_RULES,
    *DATA_RULES,
    *STRATEGY_RULES,
    *SEQUENCE_PARALLEL_RULES,
    *PATH_RULES,
)
