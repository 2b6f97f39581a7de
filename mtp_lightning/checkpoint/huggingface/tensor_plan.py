"""Which stored tensor every parameter of the recipe's model starts as; nothing is left over in silence."""

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mtp_lightning.checkpoint.huggingface.canonical_names import (
    EXTRA_MATRICES,
    PLAIN,
    Parameter,
    TensorSource,
    copied_place,
    parameters_of,
)
from mtp_lightning.checkpoint.huggingface.configs import listed
from mtp_lightning.checkpoint.huggingface.families import BUFFERS
from mtp_lightning.checkpoint.huggingface.folder import HFCheckpoint
from mtp_lightning.errors import CheckpointError, visible
from mtp_lightning.recipe.schema.root import Recipe

Init = Literal["random", "copy", "fitted", "native"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Origin(NamedTuple):
    """What a parameter starts as."""

    how: Literal["loaded", "copied", "fitted", "fresh"]
    source: TensorSource | None  # None for fresh ones


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
        return {origin.source.stored for origin in self.origins.values() if origin.source}

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


def plan_import(hf_checkpoint: HFCheckpoint, recipe: Recipe, init: Init, allow: Sequence[str]) -> Plan:
    """Find an origin for every parameter.

    Args:
        hf_checkpoint: the folder.
        recipe: what its weights are to become.
        init: what heads beyond the main one start as.
        allow: patterns (`*`) of stored tensors that may be missing or left out.

    Raises:
        CheckpointError: a tensor is missing or left over and not allowed to be, or has another shape or type.
    """
    parameters = parameters_of(recipe)
    origins = {name: _origin(hf_checkpoint, parameter, recipe, init) for name, parameter in parameters.items()}
    wanted = dict.fromkeys(origin.source.stored for origin in origins.values() if origin.source)
    missing = [name for name in wanted if name not in hf_checkpoint.entries]
    unexpected = _left_over(hf_checkpoint, wanted, init)
    _check_names(hf_checkpoint, missing, unexpected, allow)
    for name, origin in origins.items():
        if origin.source and origin.source.stored in missing:
            origins[name] = Origin("fresh", None)
    plan = Plan(parameters, origins, tuple(missing), tuple(unexpected))
    _check_forms(hf_checkpoint, plan)
    return plan


def _origin(hf_checkpoint: HFCheckpoint, parameter: Parameter, recipe: Recipe, init: Init) -> Origin:
    place = parameter.place
    if place is None:
        return Origin("fresh", None)
    source = hf_checkpoint.base_source(place)
    if source is None and init == "native" and hf_checkpoint.native:
        source = hf_checkpoint.native.source(place)
    if source is not None:
        return Origin("loaded", source)
    if place.startswith(EXTRA_MATRICES):
        return Origin("copied", TensorSource(hf_checkpoint.vocabulary[1], PLAIN))
    is_copied = init in ("copy", "fitted")
    copied = copied_place(place, hf_checkpoint.section, recipe.heads.layers_per_head) if is_copied else None
    source = hf_checkpoint.base_source(copied) if copied else None
    return Origin("copied", source) if source else Origin("fresh", None)


def _left_over(hf_checkpoint: HFCheckpoint, wanted: Collection[str], init: Init) -> list[str]:
    """List stored tensors that nobody reads; copies of others and buffers are none of these."""
    native = hf_checkpoint.native
    copies = dict(native.copies) if native and init == "native" else {}
    apart = native.apart if native and init != "native" else ()
    embedding, matrix = hf_checkpoint.vocabulary
    if hf_checkpoint.section.tie_word_embeddings:
        copies[matrix] = "embed_tokens.weight"
    originals = {"embed_tokens.weight": embedding}
    originals["lm_head.weight"] = embedding if hf_checkpoint.section.tie_word_embeddings else matrix
    return [
        name
        for name in hf_checkpoint.entries
        if name not in wanted
        and not name.startswith(apart)
        and not BUFFERS.fullmatch(name)
        and not (name in copies and hf_checkpoint.is_same(name, originals[copies[name]]))
    ]


def _check_names(
    hf_checkpoint: HFCheckpoint, missing: Iterable[str], unexpected: Iterable[str], allow: Sequence[str]
) -> None:
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
        heads = f" The folder brings heads of its own ({hf_checkpoint.native.name}):" if hf_checkpoint.native else ""
        raise CheckpointError(
            "every tensor that the model needs must be in the folder, and every one in the folder must be used",
            f"{found}; in {hf_checkpoint.path}",
            "Check that this is the right model;"
            + (f"{heads} import them with --init native and their number, or" if heads else "")
            + " name with --allow PATTERN what may be left out or begin fresh",
        )


def _check_forms(hf_checkpoint: HFCheckpoint, plan: Plan) -> None:
    """Refuse tensors of another shape than the settings say, or not made of plain numbers."""
    shapes, types = {}, {}
    for name, origin in plan.origins.items():
        if origin.source is not None:
            entry, shape = hf_checkpoint.entries[origin.source.stored], plan.parameters[name].shape
            wanted = origin.source.layout.stored_shape(shape)
            if entry.shape != wanted:
                shapes[origin.source.stored] = f"{origin.source.stored} {list(entry.shape)} instead of {list(wanted)}"
            if entry.dtype not in DTYPES:
                types[origin.source.stored] = f"{origin.source.stored} of {entry.dtype}".replace("torch.", "")
    if shapes:
        raise CheckpointError(
            f"tensors must have the shapes that {hf_checkpoint.settings_path.name} says",
            f"{listed([*shapes.values()])}; in {hf_checkpoint.path}",
            "Take settings and weights from the same model",
        )
    if types:
        raise CheckpointError(
            "weights must be plain fp32, bf16, fp16 or fp64 numbers",
            f"{listed([*types.values()])}; in {hf_checkpoint.path}",
            "Take the model's release without quantization",
        )
