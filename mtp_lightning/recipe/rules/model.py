"""What must hold between the rotary positions and the width of a head."""

from mtp_lightning.recipe.rules.base import Rule
from mtp_lightning.recipe.schema.root import Recipe


def _turns_pairs(recipe: Recipe) -> bool:
    """Leave heads of an odd width to the rule about these."""
    model = recipe.model
    if model.partial_rotary_factor == 1 or (model.hidden_size % model.num_attention_heads and model.head_dim is None):
        return True
    return model.rotary_width >= 2 and model.rotary_width % 2 == 0


def _slows_a_range(recipe: Recipe) -> bool:
    scaling = recipe.model.rope_scaling
    return scaling is None or scaling.kind != "llama3" or scaling.low_freq_factor < scaling.high_freq_factor


MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("model.partial_rotary_factor", "model.head_dim", "model.hidden_size", "model.num_attention_heads"),
        holds=_turns_pairs,
        expected="must leave an even number of channels, 2 or more: rotary positions turn pairs",
        hint=lambda recipe: (
            f"It is {recipe.model.rotary_width} of {recipe.model.resolved_head_dim} channels: change the share, "
            "or the width of a head."
        ),
    ),
    Rule(
        fields=("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor"),
        holds=_slows_a_range,
        expected="must lie below model.rope_scaling.high_freq_factor",
        hint="Take the factors from the model's config.json: low_freq_factor is the smaller one.",
    ),
)
