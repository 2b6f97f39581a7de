"""Rules between the parts of a learning-rate schedule, the optimizer and what it is spread over."""

from collections.abc import Callable, Mapping

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.head_kinds import BUILT_IN
from mtp_lightning.recipe.learning_rate import decay_steps
from mtp_lightning.recipe.rules.base import Rule, value_at
from mtp_lightning.recipe.schema.root import OptimizerSection, Recipe
from mtp_lightning.recipe.tree import COMMAND_LINE

DEFAULT = "default"
DEFAULTS = OptimizerSection()


def _of_wsd(field: str) -> Rule:
    """Build the rule that a field which only wsd reads keeps its default elsewhere."""
    default = getattr(DEFAULTS, field)
    return Rule(
        fields=(f"optimizer.{field}", "optimizer.schedule"),
        holds=lambda recipe: recipe.optimizer.schedule == "wsd" or getattr(recipe.optimizer, field) == default,
        expected=f"must stay {default}: only the schedule wsd reads it",
        hint=f"Set optimizer.schedule=wsd, or remove optimizer.{field}.",
    )


def _of_kind(kind: str) -> Rule:
    """Build the rule that the settings of an optimizer keep their defaults with the others."""
    return Rule(
        fields=(f"optimizer.{kind}", "optimizer.kind"),
        holds=lambda recipe: (
            recipe.optimizer.kind == kind or getattr(recipe.optimizer, kind) == getattr(DEFAULTS, kind)
        ),
        expected=f"must keep its defaults: only optimizer.kind {kind} reads it",
        hint=f"Set optimizer.kind={kind}, or remove optimizer.{kind}.",
    )


def _of_mup(field: str, value: str, is_allowed: Callable[[Recipe], bool], why: str, hint: str) -> Rule:
    """Build the rule that a field has a value with which the scaling by width is defined."""
    return Rule(
        fields=(field, "optimizer.mup_base_width"),
        holds=lambda recipe: recipe.optimizer.mup_base_width is None or is_allowed(recipe),
        expected=f"must be {value} with optimizer.mup_base_width: {why}",
        hint=f"{hint}, or remove optimizer.mup_base_width.",
    )


MUP_RULES = (
    _of_mup(
        *("optimizer.kind", "adamw", lambda recipe: recipe.optimizer.kind == "adamw"),
        *("the factors are those of Adam, and others scale by shape themselves", "Set optimizer.kind=adamw"),
    ),
    _of_mup(
        *("model.family", "a family of ours", lambda recipe: not recipe.model.is_foreign),
        *("initial values and multipliers of a model of transformers are its own", "Choose another model.family"),
    ),
    _of_mup(
        *("model.tie_word_embeddings", "false", lambda recipe: not recipe.model.tie_word_embeddings),
        *("an embedding learns at the whole rate, an unembedding does not", "Set model.tie_word_embeddings=false"),
    ),
    _of_mup(
        *("adapt.lora", "null", lambda recipe: recipe.adapt.lora is None),
        *("low-rank updates do not grow with the width", "Remove adapt.lora"),
    ),
    _of_mup(
        *("heads.kind", "a built-in one", lambda recipe: recipe.heads.kind in BUILT_IN),
        *("how matrices of other heads grow with the width is not known", f"Choose {', '.join(BUILT_IN)}"),
    ),
)


def _rewarms_in_time(recipe: Recipe) -> bool:
    section = recipe.optimizer
    return section.rewarm_at is None or 0 < section.warmup_steps <= section.rewarm_at < recipe.run.steps


def _profiles_in_run(recipe: Recipe) -> bool:
    first, last = recipe.debug.profile_steps or (1, 1)
    return first <= last <= recipe.run.steps


OPTIMIZER_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("debug.profile_steps", "run.steps"),
        holds=_profiles_in_run,
        expected="must be two steps of the run, the later one last",
        hint="Give e.g. [3, 5] (mtp train --profile 3-5).",
    ),
    Rule(
        fields=("optimizer.betas",),
        holds=lambda recipe: all(0 <= beta < 1 for beta in recipe.optimizer.betas),
        expected="must each be >= 0 and < 1",
        hint="Choose decay rates such as [0.9, 0.95].",
    ),
    *map(_of_kind, ("muon", "adafactor")),
    *MUP_RULES,
    Rule(
        fields=("optimizer.betas", "optimizer.eps", "optimizer.kind"),
        holds=lambda recipe: (
            recipe.optimizer.kind != "adafactor"
            or (recipe.optimizer.betas, recipe.optimizer.eps) == (DEFAULTS.betas, DEFAULTS.eps)
        ),
        expected=f"must stay {DEFAULTS.betas} and {DEFAULTS.eps}: optimizer.kind adafactor does not read them",
        hint="Remove them (see optimizer.adafactor), or set optimizer.kind=adamw.",
    ),
    Rule(
        fields=("optimizer.kind", "strategy.kind"),
        holds=lambda recipe: recipe.optimizer.kind != "adafactor" or recipe.strategy.kind == "single",
        expected="must be adamw or muon under zero1, zero2 and zero3: Adafactor takes means of whole rows and columns, "
        "and ZeRO gives each rank an interval of flattened matrices",
        hint="Set optimizer.kind=muon, or strategy.kind=single and one rank; or train under a Trainer of your own "
        'with strategy="ddp", where every rank holds the whole model.',
    ),
    *map(_of_wsd, ("decay_fraction", "decay_shape")),
    Rule(
        fields=("optimizer.ema.from_step", "run.steps"),
        holds=lambda recipe: recipe.optimizer.ema is None or recipe.optimizer.ema.from_step < recipe.run.steps,
        expected="must be before the end of the run: there would be no average",
        hint="Lower optimizer.ema.from_step, or set optimizer.ema=null.",
    ),
    Rule(
        fields=("optimizer.ema", "strategy.offload_optimizer", "strategy.offload_parameters"),
        holds=lambda recipe: (
            recipe.optimizer.ema is None
            or (recipe.strategy.offload_optimizer, recipe.strategy.offload_parameters) == ("none", "none")
        ),
        expected="must be null with offloading: the average lies beside the weights, on the GPU",
        hint="Set optimizer.ema=null, or offload nothing and shard more (strategy.kind=zero3).",
    ),
    Rule(
        fields=("optimizer.kind", "strategy.offload_optimizer", "strategy.offload_parameters"),
        holds=lambda recipe: (
            recipe.optimizer.kind != "muon"
            or (recipe.strategy.offload_optimizer, recipe.strategy.offload_parameters) == ("none", "none")
        ),
        expected="must be adamw with offloading: Muon needs whole matrices on the GPU",
        hint="Set optimizer.kind=adamw, or offload nothing and shard more (strategy.kind=zero3).",
    ),
    Rule(
        fields=("optimizer.rewarm_at", "optimizer.warmup_steps", "run.steps"),
        holds=_rewarms_in_time,
        expected="must be null, or a step after the first warm-up (of at least one step) and before the end of the run",
        hint="Give the step that the run has been continued at, and raise run.steps beyond it.",
    ),
)


def check_schedule(recipe: Recipe, origins: Mapping[str, str]) -> list[Fault]:
    """Return a fault if warm-up and decay of wsd are longer than the run, unless nobody wrote them for its length.

    A run that the command line has made shorter, to try a recipe out, ends within its warm-up; so does a resolved
    recipe, in which nothing tells any more what was written by whom. Other schedules may end while they warm up.

    >>> sections = {"optimizer": {"warmup_steps": 50, "schedule": "wsd", "decay_fraction": 0.1}, "run": {"steps": 20}}
    >>> [fault.path for fault in check_schedule(Recipe.model_validate(sections), {"optimizer.schedule": COMMAND_LINE})]
    ['optimizer.warmup_steps']
    """
    section, steps = recipe.optimizer, recipe.run.steps
    parts = ["optimizer.warmup_steps", "optimizer.schedule", "optimizer.decay_fraction"]
    if section.schedule != "wsd" or section.warmup_steps + decay_steps(section, steps) <= steps:
        return []
    written = {field: origins.get(field, DEFAULT) for field in (*parts, "run.steps")}
    of_parts = [origin for field, origin in written.items() if field != "run.steps" and origin != DEFAULT]
    is_shortened = written["run.steps"] == COMMAND_LINE and COMMAND_LINE not in of_parts
    is_resolved = COMMAND_LINE not in of_parts and list(origins.values()).count(DEFAULT) < len(origins) / 2
    if not of_parts or is_shortened or is_resolved:
        return []
    return [
        Fault(
            path=parts[0],
            expected="must leave room in the run for the decay of wsd",
            found=", ".join(f"{field} = {value_at(recipe, field)}" for field in written),
            origin=", ".join(dict.fromkeys(origin for origin in written.values() if origin != DEFAULT)),
            hint="Lower optimizer.warmup_steps, lower optimizer.decay_fraction, or raise run.steps.",
        )
    ]
