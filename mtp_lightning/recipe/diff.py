"""Recipes compared: what differs, what that means for a run that is resumed, and a hash of what sets the numbers."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from mtp_lightning.recipe.schema.base import Section
from mtp_lightning.recipe.schema.describe import shortened
from mtp_lightning.recipe.schema.root import (
    CheckpointSection,
    DriftSection,
    EarlyStopSection,
    LoggingSection,
    Recipe,
    StrategySection,
)
from mtp_lightning.recipe.tree import Node
from mtp_lightning.recipe.yaml import one_line_yaml

Verdict = Literal["warn", "refuse"]

RUN_FIELDS = frozenset(
    {
        "name",
        "debug.shrink",
        "debug.profile_steps",
        "model.family",
        "data.cache_gib",
        "data.max_epochs",
        "data.workers",
        "memory.cache_hidden_states",
        "memory.offload_activations",
        "run.dir",
        "run.cache",
        "run.restart",
        "run.device",
        "run.threads",
        "run.validate_every_steps",
        *(f"checkpoint.{name}" for name in CheckpointSection.model_fields),
        "health.hang_after_s",
        "health.hang_factor",
        "health.nonfinite.skip_steps",
        "health.nonfinite.rollbacks",
        "run.sample",
        "run.early_stop",
        *(f"run.early_stop.{name}" for name in EarlyStopSection.model_fields),
        "health.drift",
        *(f"health.drift.{name}" for name in DriftSection.model_fields),
        *(f"logging.{name}" for name in LoggingSection.model_fields),
    }
)
"""Fields that say where and how a run is carried out, not what it computes."""

REORDERED = "the same sums in another order: the numbers agree up to rounding"
OTHER_RANKS = "the same sums over other ranks: the numbers agree up to rounding"
NOTED: dict[str, str] = {
    "batch.micro_batch_size": REORDERED,
    "objective.backward_order": REORDERED,
    "objective.chunk_mib": REORDERED,
    "memory.recompute_trunk": REORDERED,
    "memory.recompute_heads": REORDERED,
    "memory.mlp_tile": REORDERED,
    "memory.compile": REORDERED,
    "memory.loss_kernel": REORDERED,
    "run.deterministic": REORDERED,
    "data.shards": "the shards may have moved; their fingerprint is compared instead",
    "data.mixture": "the shards may have moved; their fingerprints and shares are compared instead",
    "data.tokenizer": "the file may have moved; its hash is compared with that of the shards instead",
    "data.chat_template": "the file may have moved; its hash is compared with that of the shards instead",
    "optimizer.rewarm_at": "the learning rate is that of another schedule from here on",
    "run.validation_samples": "validation figures from here on are of other rows",
    **dict.fromkeys(
        ("init.path", "init.optimizer", "init.data_position", "heads.extend"),
        "read only by a run that has no checkpoint yet",
    ),
    **{f"strategy.{name}": OTHER_RANKS for name in StrategySection.model_fields},
    "strategy.reduce_dtype": "the same sums, rounded more or less",
}
"""Fields that may change on resume, and what the user should know about it."""

REASONS: dict[str, str] = {
    "model": "the checkpoint holds the tensors of another model",
    "heads": "the checkpoint holds the tensors of other heads",
    "freeze": "other parameters would be trained than the optimizer's state is of",
    "adapt": "other tensors would be trained than the checkpoint holds",
    "objective": "the rest of the run would minimise another loss",
    "data": "the rest of the run would read other tokens",
    "batch": "the position in the data would mean another batch",
    "optimizer": "the optimizer's state comes from other settings",
    "run": "the rest of the run would compute other numbers",
    "phases": "each phase is compared with its own checkpoints",
}
"""Why any other field must not change on resume, by section."""


@dataclass(frozen=True)
class FieldDiff:
    """A field in which two recipes differ; a whole section where only one has it or the kinds differ."""

    path: str
    a: Any
    b: Any


@dataclass(frozen=True)
class FieldChange:
    """A field that changed between a run and its continuation, and what that means."""

    path: str
    old: Any
    new: Any
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        old, new = (shortened(one_line_yaml(value)) for value in (self.old, self.new))
        return f"{self.path}: {old} -> {new} ({self.reason})"


def leaves(section: Section, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the plain value of every field by its dotted path.

    >>> leaves(Recipe())["heads.num_offsets"]
    4
    """
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        values |= _leaves_of(getattr(section, name), (*prefix, name))
    return values


def _leaves_of(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(value, Section):
        return leaves(value, names)
    if is_named_sections(value):
        return {path: leaf for key, entry in value.items() for path, leaf in leaves(entry, (*names, key)).items()}
    return {".".join(names): value}


def origins_of(recipe: Recipe, tree: Node) -> dict[str, str]:
    """Say for every field where its value was written; `default` where nowhere."""
    origins = {}
    for name in leaves(recipe):
        node = tree.at(tuple(name.split(".")))
        origins[name] = ", ".join(dict.fromkeys(node.origins_below())) if node else "default"
    return origins


def is_named_sections(value: Any) -> bool:
    """Tell whether a value is a mapping of sections by names that the user gives."""
    return isinstance(value, dict) and any(isinstance(entry, Section) for entry in value.values())


def diff_recipes(a: Recipe, b: Recipe) -> list[FieldDiff]:
    """List the fields in which two recipes differ, in the order of the sections.

    >>> diff_recipes(Recipe(), Recipe.model_validate({"run": {"seed": 1}}))
    [FieldDiff(path='run.seed', a=0, b=1)]
    """
    return _diff_sections(a, b, ())


def _diff_sections(a: Section, b: Section, prefix: tuple[str, ...]) -> list[FieldDiff]:
    differences: list[FieldDiff] = []
    for name in type(a).model_fields:
        left, right, path = getattr(a, name), getattr(b, name), (*prefix, name)
        if isinstance(left, Section) and type(left) is type(right):
            differences += _diff_sections(left, right, path)
        elif left != right:
            differences.append(FieldDiff(".".join(path), _plain(left), _plain(right)))
    return differences


def _plain(value: Any) -> Any:
    if is_named_sections(value):
        return {key: entry.model_dump() for key, entry in value.items()}
    return value.model_dump() if isinstance(value, Section) else value


def recipe_hash(recipe: Recipe, *, ignore: Collection[str] = RUN_FIELDS) -> str:
    """Return the SHA-256 of all fields but the ignored ones; equal hashes mean runs with equal numbers.

    >>> elsewhere = Recipe.model_validate({"run": {"dir": "elsewhere"}})
    >>> recipe_hash(elsewhere) == recipe_hash(Recipe())
    True
    """
    values = {path: value for path, value in leaves(recipe).items() if path not in ignore}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_fields(old: Recipe, new: Recipe) -> list[FieldChange]:
    """List the changes that matter when a run of `old` is continued with `new`, each with a verdict.

    `warn`: the run may go on, and the user should know. `refuse`: going on would mix two runs.
    Fields in `RUN_FIELDS` may change freely and are not listed.
    """
    return [_judge(diff) for diff in diff_recipes(old, new) if diff.path not in RUN_FIELDS]


def _judge(diff: FieldDiff) -> FieldChange:
    verdict: Verdict = "refuse"
    reason = NOTED.get(diff.path)
    if reason:
        verdict = "warn"
    elif diff.path == "run.steps" and diff.b > diff.a:
        verdict, reason = "warn", "schedules stretch over the longer run: the learning rate may jump here"
    elif diff.path == "run.steps":
        reason = "a shorter run would have had another learning-rate schedule from the start"
    return FieldChange(diff.path, diff.a, diff.b, verdict, reason or REASONS[diff.path.partition(".")[0]])
