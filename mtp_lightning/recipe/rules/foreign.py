"""Rules of a model that is built of transformers' classes: one place says what it is, `model.hf_config`."""

from mtp_lightning.recipe.rules.base import Rule, value_at
from mtp_lightning.recipe.schema.model import OWN_ONLY, SETTLED, ModelSection, settled_by
from mtp_lightning.recipe.schema.root import Recipe

NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")


def _is_settled(recipe: Recipe) -> bool:
    return not recipe.model.is_foreign or all(field in settled_by(recipe.model.hf_config) for field in NEEDED)


def _agrees(field: str) -> Rule:
    """Build the rule that a field which `hf_config` settles says the same."""
    return Rule(
        fields=(f"model.{field}",),
        holds=lambda recipe: (
            not recipe.model.is_foreign
            or value_at(recipe, f"model.{field}")
            == settled_by(recipe.model.hf_config).get(field, value_at(recipe, f"model.{field}"))
        ),
        expected="must be what model.hf_config says, of a model of transformers",
        hint=lambda recipe: f"Remove it: model.hf_config says {settled_by(recipe.model.hf_config)[field]}.",
    )


def _is_left(field: str) -> Rule:
    """Build the rule that a field which a model of transformers does not read keeps its default."""
    default = ModelSection.model_fields[field].default
    return Rule(
        fields=(f"model.{field}", "model.family"),
        holds=lambda recipe: not recipe.model.is_foreign or value_at(recipe, f"model.{field}") == default,
        expected="must be left out for family transformers, whose model.hf_config says everything",
        hint=f"Remove model.{field}.",
    )


FOREIGN_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("model.hf_config", "model.family"),
        holds=lambda recipe: recipe.model.is_foreign == (recipe.model.hf_config is not None),
        expected="must be given for family transformers, and only there",
        hint="Write what the model's config.json says there, beside family: transformers; `mtp import` does both.",
    ),
    Rule(
        fields=("model.hf_config",),
        holds=lambda recipe: recipe.model.hf_config is None or _is_settled(recipe),
        expected="must say how wide the model is, how many layers it has, and how large its vocabulary is",
        hint=f"Write the whole config.json, with {', '.join(NEEDED)} or what they are called there.",
    ),
    *map(_agrees, SETTLED),
    *map(_is_left, OWN_ONLY),
    Rule(
        fields=("heads.layers_from_trunk", "model.family"),
        holds=lambda recipe: not (recipe.model.is_foreign and recipe.heads.layers_from_trunk),
        expected="must be false for family transformers: model.hf_config says how many layers the model has",
        hint="Set heads.layers_from_trunk=false; extra heads then have layers of their own.",
    ),
)
