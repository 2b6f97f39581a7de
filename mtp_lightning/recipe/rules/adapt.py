"""What must hold of an adaptation."""

from typing import get_args

from mtp_lightning.recipe.layer_counts import num_head_layers, num_trunk_layers
from mtp_lightning.recipe.rules.base import Rule, value_at
from mtp_lightning.recipe.schema.describe import one_of
from mtp_lightning.recipe.schema.model import Target
from mtp_lightning.recipe.schema.objective import CurriculumWeights, LambdaWeights
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import TrainableParts, mixing_offsets


def adapted_targets(recipe: Recipe) -> tuple[str, ...]:
    """List the targets of `adapt.lora` that the model has projections for.

    >>> lora = {"targets": ["q", "gate"]}
    >>> recipe = Recipe.model_validate({"adapt": {"lora": lora}, "model": {"mlp": "gelu"}})
    >>> adapted_targets(recipe)
    ('q',)
    """
    lora = recipe.adapt.lora
    return tuple(target for target in lora.targets if target != "gate" or recipe.model.mlp != "gelu") if lora else ()


def added_by(recipe: Recipe) -> dict[str, str]:
    """Describe the tensors that an adaptation adds, by its section; equal words mean tensors of the same shapes.

    >>> added_by(Recipe.model_validate({"adapt": {"lora": {"targets": ["v", "q"]}}}))
    {'lora': 'updates of rank 8 of q and v'}
    """
    lora, mixed = recipe.adapt.lora, mixing_offsets(recipe)
    added = {}
    if lora is not None:
        targets = [target for target in get_args(Target) if target in lora.targets]
        where = " in trunk and heads" if lora.in_heads else ""
        added["lora"] = f"updates of rank {lora.rank} of {one_of(targets, 'and')}{where}"
    if mixed:
        added["layer_mix"] = f"mixtures for offsets {', '.join(map(str, mixed))}"
    return added


def _learns_throughout(recipe: Recipe) -> bool:
    """Check that the main head is trained where, for a while, no other offset has a weight."""
    weights, parts = recipe.objective.weights, TrainableParts(recipe)
    is_alone = isinstance(weights, CurriculumWeights) or (
        isinstance(weights, LambdaWeights) and (weights.start == 0 or (weights.end == 0 and weights.ends_at < 1))
    )
    has_layers = recipe.heads.kind in ("parallel", "chained") and parts.head(1)
    is_mixed = 1 in mixing_offsets(recipe) and parts.mixtures
    matrix = parts.matrix(1) or parts.shared_norm(1)
    is_trained = parts.trunk or parts.updates or has_layers or is_mixed or matrix
    return recipe.first_trained_offset is not None or is_trained or not is_alone


def _needs_start(field: str) -> Rule:
    """Build the rule that a field is left alone by a run that starts from nothing."""
    return Rule(
        fields=(field, "init.path"),
        holds=lambda recipe: not value_at(recipe, field) or recipe.init.path is not None,
        expected="must be left out without init.path: there is nothing to take it from",
        hint=f"Give init.path, or remove {field}.",
    )


ADAPT_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("memory.cache_hidden_states", "freeze", "adapt.lora", "adapt.layer_mix"),
        holds=lambda recipe: (
            recipe.memory.cache_hidden_states is None
            or not (TrainableParts(recipe).trunk or recipe.adapt.lora or recipe.adapt.layer_mix)
        ),
        expected="must be null unless the trunk is frozen, without low-rank updates or mixtures of its layers",
        hint="Freeze the trunk (freeze: [trunk], or offsets_below_2) and leave adapt out, or set it to null.",
    ),
    Rule(
        fields=("freeze",),
        holds=lambda recipe: TrainableParts(recipe).is_any_trained,
        expected="must leave something that is trained",
        hint="Remove a part from freeze, or add updates with adapt.lora.",
    ),
    Rule(
        fields=("adapt.lora.targets", "model.mlp"),
        holds=lambda recipe: recipe.adapt.lora is None or set(adapted_targets(recipe)) == {*recipe.adapt.lora.targets},
        expected="must name projections that the model has: a feed-forward with GELU has no gate",
        hint="Remove gate from adapt.lora.targets; the others are q, k, v, o, up and down.",
    ),
    Rule(
        fields=("adapt.lora.targets",),
        holds=lambda recipe: (
            recipe.adapt.lora is None or len({*recipe.adapt.lora.targets}) == len(recipe.adapt.lora.targets)
        ),
        expected="must name each projection once",
        hint="Remove what is there twice.",
    ),
    Rule(
        fields=("adapt.lora.in_heads", "heads.kind"),
        holds=lambda recipe: recipe.adapt.lora is None or not recipe.adapt.lora.in_heads or num_head_layers(recipe) > 0,
        expected="must be false where heads hold no transformer layers: no target would match",
        hint="Set adapt.lora.in_heads=false, or choose another heads.kind.",
    ),
    Rule(
        fields=("adapt.lora.dropout", "adapt.lora.in_heads", "objective.distill.detach_teacher"),
        holds=lambda recipe: (
            recipe.adapt.lora is None
            or recipe.objective.distill is None
            or recipe.objective.distill.detach_teacher
            or not (recipe.adapt.lora.dropout and recipe.adapt.lora.in_heads)
        ),
        expected="must be 0 in heads that a distillation trains as teachers: they are run twice, with other zeros",
        hint="Set adapt.lora.dropout=0, or objective.distill.detach_teacher=true.",
    ),
    Rule(
        fields=("adapt.layer_mix.main_head", "heads.kind", "heads.num_offsets"),
        holds=lambda recipe: recipe.adapt.layer_mix is None or bool(mixing_offsets(recipe)),
        expected="must leave a head that reads the trunk",
        hint="Set adapt.layer_mix.main_head=true, or choose parallel, linear or medusa heads.",
    ),
    Rule(
        fields=("adapt.layer_mix.temperature", "model.num_hidden_layers", "heads.layers_from_trunk"),
        holds=lambda recipe: recipe.adapt.layer_mix is None or num_trunk_layers(recipe) != 1,
        expected="must have layers to choose from: the trunk has 1",
        hint="Raise model.num_hidden_layers, or set adapt.layer_mix=null.",
    ),
    Rule(
        fields=("adapt.layer_mix.main_head", "freeze"),
        holds=lambda recipe: (
            recipe.adapt.layer_mix is None
            or recipe.first_trained_offset is None
            or min(mixing_offsets(recipe), default=recipe.heads.num_offsets) >= recipe.first_trained_offset
        ),
        expected="must leave mixtures to heads that are trained only: a frozen head would read the mean of all layers",
        hint="Set adapt.layer_mix.main_head=false, or freeze=[].",
    ),
    Rule(
        fields=("objective.weights", "freeze"),
        holds=_learns_throughout,
        expected="must give a trained offset a weight at every step: all that the main head depends on is frozen, and "
        "for a while it alone has one",
        hint="Choose constant or decay weights, or take unembedding or trunk out of freeze.",
    ),
    Rule(
        fields=("adapt.layer_mix.temperature", "heads.detach_trunk"),
        holds=lambda recipe: recipe.adapt.layer_mix is None or not recipe.heads.detach_trunk,
        expected="must be left out with heads.detach_trunk, which lets no gradient reach the mixtures",
        hint="Freeze the trunk (freeze=[trunk]), or set heads.detach_trunk=false.",
    ),
    Rule(
        fields=("health.drift.samples", "init.path"),
        holds=lambda recipe: (
            recipe.health.drift in ("auto", None) or recipe.init.path is not None or recipe.phases != {}
        ),
        expected="must be left out without init.path: there is no model to compare the main head with",
        hint="Give init.path, or set health.drift=null.",
    ),
    *(_needs_start(field) for field in ("init.optimizer", "init.data_position", "heads.extend")),
)
