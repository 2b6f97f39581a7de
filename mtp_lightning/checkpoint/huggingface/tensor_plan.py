"""Which stored tensor every parameter of the recipe's model starts as; nothing is left over in silence."""

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mtp_lightning.checkpoint.format.read_shards import MOST_NAMES
from mtp_lightning.checkpoint.huggingface.canonical_names import Parameter, copied_place, parameters_of
from mtp_lightning.checkpoint.huggingface.families import BUFFERS
from mtp_lightning.checkpoint.huggingface.folder import Foreign
from mtp_lightning.checkpoint.huggingface.tensor_layouts import Cell
from mtp_lightning.checkpoint.huggingface.tensor_source import is_same
from mtp_lightning.errors import CheckpointError, visible
from mtp_lightning.recipe.schema.root import Recipe

Init = Literal["random", "copy", "native"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Origin(NamedTuple):
    """What a parameter starts as."""

    how: Literal["loaded", "copied", "fresh"]
    cell: Cell | None  # None for fresh ones


@dataclass(frozen=True)
class Plan:
    """The import of a folder, checked, before any tensor is read."""

    parameters: dict[str, Parameter]
    origins: dict[str, Origin]
    missing: tuple[str, ...]  # stored tensors that are allowed to be absent; what they would fill is fresh
    unexpected: tuple[str, ...]  # stored tensors that are allowed to be left out

    @property
    def used(self) -> set[str]:
        """Stored tensors that are read."""
        return {origin.cell.stored for origin in self.origins.values() if origin.cell}

    def report(self) -> list[str]:
        """Say what every module starts as, a line for each."""
        counts: dict[str, Counter[str]] = {}
        for name, origin in self.origins.items():
            counts.setdefault(self.parameters[name].owner, Counter())[origin.how] += 1
        width = max(map(len, [*counts, "unexpected"]))
        lines = [
            f"  {owner:{width}}  " + ", ".join(f"{count} {how}" for how, count in counted.items())
            for owner, counted in counts.items()
        ]
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines += [f"  {what:{width}}  {len(names)} allowed: {visible(listed(names), kept='')}"] if names else []
        return lines


def plan_import(foreign: Foreign, recipe: Recipe, init: Init, allow: Sequence[str]) -> Plan:
    """Find an origin for every parameter.

    Args:
        foreign: the folder.
        recipe: what its weights are to become.
        init: what heads beyond the main one start as.
        allow: patterns (`*`) of stored tensors that may be missing or left out.

    Raises:
        CheckpointError: a tensor is missing or left over and not allowed to be, or has another shape or type.
    """
    parameters = parameters_of(recipe)
    origins = {name: _origin(foreign, parameter, recipe, init) for name, parameter in parameters.items()}
    wanted = dict.fromkeys(origin.cell.stored for origin in origins.values() if origin.cell)
    missing = [name for name in wanted if name not in foreign.entries]
    unexpected = _left_over(foreign, wanted, init)
    _check_names(foreign, missing, unexpected, allow)
    for name, origin in origins.items():
        if origin.cell and origin.cell.stored in missing:
            origins[name] = Origin("fresh", None)
    plan = Plan(parameters, origins, tuple(missing), tuple(unexpected))
    _check_forms(foreign, plan)
    return plan


def _origin(foreign: Foreign, parameter: Parameter, recipe: Recipe, init: Init) -> Origin:
    place = parameter.place
    if place is None:
        copies_matrix = parameter.owner == "unembedding"
        return Origin("copied", foreign.base_cell("lm_head.weight")) if copies_matrix else Origin("fresh", None)
    cell = foreign.base_cell(place)
    if cell is None and init == "native" and foreign.native:
        cell = foreign.native.cell(place)
    if cell is not None:
        return Origin("loaded", cell)
    copied = (
        copied_place(place, foreign.section.num_hidden_layers, recipe.heads.layers_per_head) if init == "copy" else None
    )
    cell = foreign.base_cell(copied) if copied else None
    return Origin("copied", cell) if cell else Origin("fresh", None)


def _left_over(foreign: Foreign, wanted: Collection[str], init: Init) -> list[str]:
    """List stored tensors that nobody reads; copies of others and buffers are none of these."""
    copies = dict(foreign.native.copies) if foreign.native and init == "native" else {}
    embedding, matrix = foreign.base_cell("embed_tokens.weight"), foreign.base_cell("lm_head.weight")
    assert embedding is not None
    assert matrix is not None
    if foreign.section.tie_word_embeddings:
        copies[matrix.stored] = "embed_tokens.weight"
    originals = {"embed_tokens.weight": embedding.stored}
    originals["lm_head.weight"] = embedding.stored if foreign.section.tie_word_embeddings else matrix.stored
    return [
        name
        for name in foreign.entries
        if name not in wanted
        and not BUFFERS.fullmatch(name)
        and not (name in copies and is_same(foreign, name, originals[copies[name]]))
    ]


def _check_names(foreign: Foreign, missing: Iterable[str], unexpected: Iterable[str], allow: Sequence[str]) -> None:
    """Refuse what is missing or left over and not allowed, and what is allowed in vain."""
    faults = {"missing": [*missing], "unexpected": [*unexpected]}
    for pattern in allow:
        if not any(fnmatch.fnmatchcase(name, pattern) for names in faults.values() for name in names):
            raise CheckpointError(
                "--allow must name tensors that are missing or unexpected",
                f"none like {pattern!r} (missing: {listed(faults['missing'])}; "
                f"unexpected: {listed(faults['unexpected'])})",
                "Correct or remove it",
            )
    refused = {
        what: [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)]
        for what, names in faults.items()
    }
    if any(refused.values()):
        found = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in refused.items() if names)
        heads = f" The folder brings heads of its own ({foreign.native.name}):" if foreign.native else ""
        raise CheckpointError(
            "every tensor that the model needs must be in the folder, and every one in the folder must be used",
            f"{found}; in {foreign.path}",
            "Check that this is the right model;"
            + (f"{heads} import them with --init native and their number, or" if heads else "")
            + " name with --allow PATTERN what may be left out or begin fresh",
        )


def _check_forms(foreign: Foreign, plan: Plan) -> None:
    """Refuse tensors of another shape than the settings say, or not made of plain numbers."""
    shapes, types = {}, {}
    for name, origin in plan.origins.items():
        if origin.cell is not None:
            entry, shape = foreign.entries[origin.cell.stored], plan.parameters[name].shape
            wanted = origin.cell.packing.stored_shape(shape)
            if entry.shape != wanted:
                shapes[origin.cell.stored] = f"{origin.cell.stored} {list(entry.shape)} instead of {list(wanted)}"
            if entry.dtype not in DTYPES:
                types[origin.cell.stored] = f"{origin.cell.stored} of {entry.dtype}".replace("torch.", "")
    if shapes:
        raise CheckpointError(
            f"tensors must have the shapes that {foreign.settings_path.name} says",
            f"{listed([*shapes.values()])}; in {foreign.path}",
            "Take settings and weights from the same model",
        )
    if types:
        raise CheckpointError(
            "weights must be plain fp32, bf16 or fp16 numbers",
            f"{listed([*types.values()])}; in {foreign.path}",
            "Take the model's release without quantization",
        )


def listed(names: Sequence[str]) -> str:
    """Name some, and say how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[:MOST_NAMES]) or "none") + more
