"""What must hold for on-policy training."""

from mtp_lightning.recipe.rules.base import Rule

ROLLOUT_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("objective.rollout.where", "model.family"),
        holds=lambda recipe: (
            not recipe.model.is_foreign or recipe.objective.rollout is None or recipe.objective.rollout.where != "all"
        ),
        expected="must be reached for family transformers, whose masks know one stream of positions",
        hint="Set objective.rollout.where=reached, or objective.rollout=null.",
    ),
    Rule(
        fields=("objective.rollout", "heads.kind"),
        holds=lambda recipe: recipe.objective.rollout is None or recipe.heads.kind in ("sequential", "recursive"),
        expected="must be null unless heads.kind is sequential or recursive: the other kinds read no tokens",
        hint="Set objective.rollout=null, or choose heads.kind=sequential or recursive.",
    ),
    Rule(
        fields=("objective.rollout", "heads.num_offsets"),
        holds=lambda recipe: recipe.objective.rollout is None or recipe.heads.num_offsets > 2,
        expected="must be null with fewer than 3 offsets: no offset would read a draft",
        hint="Raise heads.num_offsets, or set objective.rollout=null.",
    ),
    Rule(
        fields=("objective.rollout.start", "objective.rollout.warmup_steps"),
        holds=lambda recipe: (
            recipe.objective.rollout is None
            or not recipe.objective.rollout.start
            or recipe.objective.rollout.warmup_steps > 0
        ),
        expected="must be 0 without objective.rollout.warmup_steps, in which the share changes",
        hint="Give objective.rollout.warmup_steps, or remove objective.rollout.start.",
    ),
)
