"""A recipe with phases as one recipe after the other, each in a folder of its own and from the weights before it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtp_lightning.errors import CheckpointError, Fault, RecipeError
from mtp_lightning.recipe.add_heads import extended_recipe
from mtp_lightning.recipe.diff import origins_of
from mtp_lightning.recipe.loading.validate import check_fields, unknown_names_below
from mtp_lightning.recipe.rules.adapt import added_by
from mtp_lightning.recipe.rules.all import check_rules
from mtp_lightning.recipe.schema.describe import one_of
from mtp_lightning.recipe.schema.field_types import changes_kind, place_at
from mtp_lightning.recipe.schema.model import BELOW
from mtp_lightning.recipe.schema.phases import FOLDER, PhaseSection
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.tree import Node, merge, node_of

CHANGED_SECTIONS = (
    *("freeze", "heads", "adapt", "objective", "memory", "data", "batch", "optimizer"),
    *("run", "checkpoint", "logging", "health"),
)
CHANGED_FIELDS: Mapping[str, frozenset[str]] = {
    "heads": frozenset({"detach_trunk"}),
    "run": frozenset({"steps", "early_stop", "validate_every_steps", "validation_samples"}),
    "checkpoint": frozenset({"every_steps", "every_minutes", "keep", "keep_every_steps"}),
    "logging": frozenset({"every_steps"}),
    "health": frozenset({"drift", "hang_after_s", "hang_factor"}),
}
"""What a phase may change of sections that are not its own as a whole."""
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Phase:
    """One stretch of a run: a recipe without phases, in a run folder of its own."""

    number: int  # from 1
    name: str
    recipe: Recipe

    @property
    def title(self) -> str:
        """Number and name, as its folder is called.

        >>> Phase(2, "joint", Recipe()).title
        '2-joint'
        """
        return f"{self.number}-{self.name}"


def phases_of(recipe: Recipe) -> tuple[Phase, ...]:
    """Return the phases of a recipe, in their order.

    >>> recipe = Recipe.model_validate({"phases": {"a": {"run": {"steps": 5}}, "b": {"objective": {"z_loss": 1e-4}}}})
    >>> [(phase.recipe.run.steps, phase.recipe.init.path, phase.recipe.run.dir) for phase in phases_of(recipe)]
    [(5, None, 'runs/default/phases/1-a'), (1000, 'runs/default/phases/1-a', 'runs/default/phases/2-b')]

    Raises:
        RecipeError: A phase breaks a rule.
    """
    steps = list(_walk(recipe, node_of(recipe.model_dump(), "default")))
    if faults := [fault for step in steps for fault in step.faults]:
        raise RecipeError(faults)
    return tuple(step.phase for step in steps)


def check_phases(recipe: Recipe, tree: Node) -> list[Fault]:
    """Return all faults of a recipe's phases.

    Args:
        recipe: the recipe, whose own fields are in order.
        tree: its values as they were written.
    """
    return [fault for step in _walk(recipe, tree) for fault in step.faults]


def unknown_names_in_phases(tree: Node) -> list[Fault]:
    """Report what no recipe has among the changes of all phases: for a recipe that has other faults already."""
    phases = tree.child(FOLDER)
    sections = {part: place for part in CHANGED_SECTIONS if (place := place_at((part,)))}
    return [
        fault
        for name in (phases.value if phases and isinstance(phases.value, dict) else ())
        for part, place in sections.items()
        for fault in unknown_names_below((FOLDER, name, part), place, tree)
    ]


@dataclass(frozen=True)
class _Step:
    phase: Phase
    faults: list[Fault]


def _walk(recipe: Recipe, tree: Node) -> Iterator[_Step]:
    """Derive one phase after the other; what an extension adds is passed on to the next."""
    base = Node({key: value for key, value in tree.value.items() if key != FOLDER}, tree.origin)
    former: Phase | None = None
    for number, (name, section) in enumerate(recipe.phases.items(), start=1):
        written = tree.at((FOLDER, name)) or Node({}, "default")
        faults = [*_name_faults(name, written), *_change_faults(name, section, written)]
        before = check_fields(base).recipe
        if section.extend_to is not None:
            try:
                base = _extended(base, before, section, written.origin_at(("extend_to",)) or "default")
            except (CheckpointError, RecipeError) as error:
                faults += _faults_of_extension(error, name, written)
        values = merge(base, _changes(section, written, before, check_fields(base).recipe), replaces=changes_kind)
        place = {
            "run": {"dir": f"{recipe.run.dir}/{FOLDER}/{number}-{name}", "restart": False},
            "init": {
                "path": former.recipe.run.dir if former else recipe.init.path,
                "optimizer": section.keep_optimizer and former is not None,
                "data_position": former is not None,
            },
        }
        ramp = {"batch": {"ramp": None}} if former else {}  # it is over: it counts the rows of the whole run
        placed = node_of({"name": f"{recipe.name}/{name}", **place, **ramp}, "default")
        checked = check_fields(merge(values, placed))
        broken = [] if checked.faults else check_rules(checked.recipe, origins=origins_of(checked.recipe, values))
        faults += [_placed(fault, name, written) for fault in (*checked.faults, *broken)]
        phase = Phase(number, name, checked.recipe)
        faults += [*_optimizer_faults(former, phase, section, written), *_adapt_faults(former, phase, written)]
        former = phase
        yield _Step(phase, faults)


def _extended(base: Node, before: Recipe, section: PhaseSection, origin: str) -> Node:
    """Lay the fields that an extension changes over a recipe."""
    assert section.extend_to is not None
    group = section.extend_group or before.heads.num_offsets - 1
    longer = extended_recipe(before, section.extend_to, group).model_dump()
    fields = {
        "model": {"num_hidden_layers": longer["model"]["num_hidden_layers"]},
        "heads": {"num_offsets": section.extend_to},
        "objective": {"weights": longer["objective"]["weights"], "distill": longer["objective"]["distill"]},
    }
    return merge(base, node_of(fields, origin), replaces=changes_kind)


def _changes(section: PhaseSection, written: Node, before: Recipe, after: Recipe) -> Node:
    """Return the fields that a phase changes, with what its extension implies for itself alone."""
    entries = {name: node for name in CHANGED_SECTIONS if (node := written.child(name)) and node.value is not None}
    own = Node(entries, written.origin)
    num_trained, num_offsets = before.heads.num_offsets, after.heads.num_offsets
    if num_offsets == num_trained:
        return own
    first = 2 if after.heads.kind == "recursive" else num_trained + 1
    group = section.extend_group or num_trained - 1
    implied = {"heads": {"extend": group}, "freeze": [*before.frozen_parts, f"{BELOW}{first}"]}
    return merge(node_of(implied, written.origin), own)


def _name_faults(name: str, written: Node) -> list[Fault]:
    if _NAME.fullmatch(name):
        return []
    return [
        Fault(
            path=f"{FOLDER}.{name}",
            expected="must be named with letters, digits, - and _: it names a folder",
            found=repr(name),
            origin=written.origin,
            hint="Rename the phase.",
        )
    ]


def _change_faults(name: str, section: PhaseSection, written: Node) -> list[Fault]:
    """Name the fields that no phase may change."""
    return [
        Fault(
            path=f"{FOLDER}.{name}.{part}.{field}",
            expected=f"must be {one_of(sorted(allowed))}: the rest of {part} holds for all phases",
            found=f"a change of {part}.{field}",
            origin=written.origin_at((part, field)) or written.origin,
            hint=f"Set {part}.{field} for the whole recipe"
            + (", or give extend_to." if field in ("num_offsets", "extend") else "."),
        )
        for part, allowed in CHANGED_FIELDS.items()
        for field in getattr(section, part)
        if field not in allowed
    ]


def _faults_of_extension(error: CheckpointError | RecipeError, name: str, written: Node) -> list[Fault]:
    path, origin = f"{FOLDER}.{name}.extend_to", written.origin_at(("extend_to",)) or written.origin
    if isinstance(error, RecipeError):
        return [
            replace(
                fault,
                path=path,
                expected=f"must leave a recipe in which {fault.path} {fault.expected}",
                origin=origin,
            )
            for fault in error.faults
        ]
    expected = f"must be possible: {error.expected}"
    return [Fault(path=path, expected=expected, found=error.found, origin=origin, hint=error.hint + ".")]


def _placed(fault: Fault, name: str, written: Node) -> Fault:
    """Say of a fault in a phase's recipe where it was written in the whole one."""
    here = written.at(tuple(fault.path.split(".")))
    origin = here.origin if here else fault.origin if fault.origin != "default" else written.origin
    return replace(fault, path=f"{FOLDER}.{name}.{fault.path}", origin=origin)


def _optimizer_faults(former: Phase | None, phase: Phase, section: PhaseSection, written: Node) -> list[Fault]:
    """Name an optimizer's state that is to be kept and does not fit."""
    if not section.keep_optimizer:
        return []
    found, what = None, "trains the same parameters"
    if former is None:
        found = "the first phase"
    elif trained(former.recipe) != trained(phase.recipe):
        found = f"{_spelled(former.recipe)} trained by {former.name}, {_spelled(phase.recipe)} by {phase.name}"
    elif (kinds := [each.recipe.optimizer.kind for each in (former, phase)])[0] != kinds[1]:
        found, what = f"{kinds[0]} in {former.name}, {kinds[1]} in {phase.name}", "has the same optimizer.kind"
    if found is None:
        return []
    return [
        Fault(
            path=f"{FOLDER}.{phase.name}.keep_optimizer",
            expected=f"must be false unless the phase before {what}",
            found=found,
            origin=written.origin_at(("keep_optimizer",)) or written.origin,
            hint=f"Remove {FOLDER}.{phase.name}.keep_optimizer: the optimizer then begins anew.",
        )
    ]


def _adapt_faults(former: Phase | None, phase: Phase, written: Node) -> list[Fault]:
    """Name what the phase before has added to the model and this one would lose."""
    if former is None:
        return []
    before, after = added_by(former.recipe), added_by(phase.recipe)
    return [
        Fault(
            path=f"{FOLDER}.{phase.name}.adapt.{name}",
            expected="must add to the model what the phase before has added",
            found=f"{former.name} with {what}, {phase.name} with {after.get(name) or 'none'}",
            origin=written.origin_at(("adapt", name)) or written.origin,
            hint=f"Set adapt.{name} for the whole recipe, or give it in {phase.name} as in {former.name}.",
        )
        for name, what in before.items()
        if what != after.get(name)
    ]


def trained(recipe: Recipe) -> tuple[Any, ...]:
    """Say which parameters a recipe trains, so that equal answers mean the same ones."""
    frozen = tuple(sorted({*recipe.frozen_parts}))
    return (recipe.first_trained_offset, recipe.heads.num_offsets, frozen, added_by(recipe))


def _spelled(recipe: Recipe) -> str:
    first, n = recipe.first_trained_offset, recipe.heads.num_offsets
    parts = [f"all of {n} offsets" if first is None else f"offsets {first} to {n}"]
    parts += [f"without {', '.join(sorted({*recipe.frozen_parts}))}"] if recipe.frozen_parts else []
    return " and ".join([*parts, *added_by(recipe).values()])
