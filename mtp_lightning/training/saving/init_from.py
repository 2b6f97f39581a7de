"""Weights of another model at the beginning of a run, and parts of it that must stay as they are."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast, final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.checkpoint.format.folder import CheckpointFolder, open_checkpoint
from mtp_lightning.checkpoint.format.manifest import RECIPE_NAME
from mtp_lightning.checkpoint.format.reader_view import RenamingReader
from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.errors import CheckpointError, TrainingError
from mtp_lightning.model.add_heads import kept_parameters, parameter_origins
from mtp_lightning.model.roles import role_of
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe, num_trunk_layers
from mtp_lightning.recipe.layer_counts import num_layers_from_trunk
from mtp_lightning.recipe.rules.base import value_at
from mtp_lightning.recipe.trainable import ADDED
from mtp_lightning.training.strategies.base import RunStrategy
from mtp_lightning.training.strategies.param_shards import check_names, listed, whole_shape

SCALING = "model.rope_scaling"
SAME_FIELDS = (
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.rope_theta",
    SCALING,
    "model.partial_rotary_factor",
    "model.parallel_residual",
    "model.norm_eps",
    "heads.kind",
    "heads.order",
    "heads.hidden",
    "heads.concatenation",
    "heads.layers_per_head",
    "data.document_mask",
)
"""Fields that change what the same weights compute."""
SAME_ADDITIONS = ("adapt.lora.alpha", "adapt.layer_mix.temperature")
"""The same, where both models have what they belong to."""


@final
class InitFrom(Callback):
    """Fill a new run with the weights of `init.path`; a run that has a checkpoint goes on from that instead.

    Offsets beyond the recipe's are dropped, and named. With `heads.extend` offsets that are not there start as copies
    of trained ones; with `init.optimizer` moments come along, with `init.data_position` the data go on where that run
    stood.
    """

    recipe_field = "init.path"

    def __init__(self, recipe: Recipe, path: Path) -> None:
        self._recipe, self._path = recipe, path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the position in the data; one of this run's own checkpoints replaces it.

        Raises:
            CheckpointError: `init.path` is a model without a position.
        """
        if not self._recipe.init.data_position:
            return
        data = cast(MtpDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        with Ranks().raise_on_all_ranks():
            folder = open_checkpoint(self._path, verify=False)
            if not folder.has_state:
                raise _lacks("init.data_position", "position in the data", folder.path)
            data.go_on_from(folder.state()[type(data).__qualname__])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights, on every rank its part.

        Raises:
            CheckpointError: They are not there, damaged, or not those of the recipe's model.
        """
        if trainer.global_step:
            return
        strategy = cast(RunStrategy, pl_module.strategy)
        with strategy.ranks.raise_on_all_ranks():
            folder = open_checkpoint(self._path, verify=strategy.ranks.is_first)
            reader, fresh = self._view_of(folder, strategy)
            if strategy.ranks.is_first:
                added = f"; not in there, and fresh: {listed(fresh)}" if fresh else ""
                changes = f"{_dropped(folder.recipe, self._recipe)}{_stretched(folder.recipe, self._recipe)}"
                say(f"Starting from the weights of {folder.path}{added}{changes}")
        strategy.fill(reader)
        if self._recipe.optimizer.ema is not None:
            strategy.fill_averages(reader)

    def _view_of(self, folder: CheckpointFolder, strategy: RunStrategy) -> tuple[RenamingReader, list[str]]:
        """Check what is stored, and see it as this run's model; return this and the names that an adaptation adds."""
        own, theirs, reader = self._recipe, folder.recipe, folder.reader
        pairs = _compared(theirs, own)
        if _stretches(theirs, own):
            del pairs[SCALING]
        found = "; ".join(f"{what} {a} there and {b} here" for what, (a, b) in pairs.items() if a != b)
        fresh = {
            name: whole_shape(parameter)
            for name, parameter in strategy.named_parameters()
            if role_of(name) in ADDED and not any(role_of(stored) == role_of(name) for stored in reader.names)
        }
        view = RenamingReader(reader, has_moments=own.init.optimizer, fresh=fresh)
        if not found:
            if own.heads.extend and theirs.heads.num_offsets < own.heads.num_offsets:
                view = RenamingReader(reader, self._origins(theirs, folder.path, fresh), fresh=fresh)
            elif theirs.heads.num_offsets > own.heads.num_offsets:
                kept = _kept(theirs, own, folder.path)
                view = RenamingReader(reader, kept, has_moments=own.init.optimizer, fresh=fresh)
            try:
                check_names(view, strategy.named_parameters())
            except CheckpointError as error:
                found = error.found
        if found:
            raise CheckpointError(
                "init.path must name a model with the parameters and the architecture of this recipe",
                f"{found}, in {folder.path}",
                f"Take sections model, heads and adapt from {folder.path / RECIPE_NAME}, or leave init.path out"
                + ("; `mtp export` merges low-rank updates into the model" if "lora" in found else "")
                + _hint_of_layers(theirs, own),
            )
        trained = (name for name, parameter in strategy.named_parameters() if parameter.requires_grad)
        if own.init.optimizer and theirs.optimizer.kind != own.optimizer.kind:
            raise _lacks("init.optimizer", f"state of {own.optimizer.kind} (of {theirs.optimizer.kind})", folder.path)
        _check_width_scaling(theirs, own, folder.path)
        bare = [name for name in trained if own.init.optimizer and len(view.kinds(name)) <= 1]
        if bare:
            raise _lacks("init.optimizer", f"optimizer's state of {listed(bare)}", folder.path)
        return view, [*fresh]

    def _origins(self, theirs: Recipe, folder: Path, fresh: Collection[str]) -> dict[str, str]:
        """Find what the parameters of more offsets start as."""
        adapted = theirs.model_copy(update={"adapt": self._recipe.adapt})
        origins = parameter_origins(adapted, self._recipe, self._group(theirs, folder))
        return {name: origin for name, origin in origins.items() if name not in fresh}

    def _group(self, theirs: Recipe, folder: Path) -> int:
        """Return how many of the last trained heads are copied."""
        group, extra = self._recipe.heads.extend or 0, theirs.heads.num_offsets - 1
        if group > extra:
            raise CheckpointError(
                "heads.extend must be at most the number of heads beyond the first in init.path",
                f"heads.extend = {group}, and {extra} in {folder}",
                "Lower heads.extend, or start from a model with more heads",
            )
        return group


def _kept(theirs: Recipe, own: Recipe, folder: Path) -> dict[str, str]:
    """Name what a model with fewer offsets takes of the stored ones."""
    kept = kept_parameters(theirs, own.heads.num_offsets)
    if kept is None:
        raise CheckpointError(
            "offsets can be dropped from the last one on where no other reads it",
            f"heads.order = {theirs.heads.order}, in which the next token's head reads the others, in {folder}",
            f"Keep all: heads.num_offsets={theirs.heads.num_offsets}",
        )
    return {name: name for name in kept}


def _dropped(theirs: Recipe, own: Recipe) -> str:
    """Say which heads of the model that a run starts from it does without."""
    offsets = range(own.heads.num_offsets + 1, theirs.heads.num_offsets + 1)
    return f"; dropped: the heads of offset {', '.join(map(str, offsets))}" if offsets else ""


def _stretches(theirs: Recipe, own: Recipe) -> bool:
    """Tell whether positions are scaled for longer windows: for the first time, or by a larger factor."""
    before, after = theirs.model.rope_scaling, own.model.rope_scaling
    if after is None or before is None:
        return after is not None
    return before.factor < after.factor and before.model_copy(update={"factor": after.factor}) == after


def _stretched(theirs: Recipe, own: Recipe) -> str:
    """Say that positions turn otherwise than in the model that a run starts from."""
    scaling = own.model.rope_scaling
    if scaling is None or not _stretches(theirs, own):
        return ""
    return f"; with its positions scaled: {scaling.kind}, factor {scaling.factor:g}"


def _hint_of_layers(theirs: Recipe, own: Recipe) -> str:
    """Say how many layers a model with other offsets has in all, if its trunk is to be the same."""
    wanted = num_trunk_layers(theirs) + num_layers_from_trunk(own)
    if theirs.heads.num_offsets == own.heads.num_offsets or wanted == own.model.num_hidden_layers:
        return ""
    return f"; with heads.num_offsets={own.heads.num_offsets} that is model.num_hidden_layers={wanted}"


def _compared(theirs: Recipe, own: Recipe) -> dict[str, tuple[Any, Any]]:
    """Pair what must be the same in both recipes, by its name."""
    pairs = {field: (value_at(theirs, field), value_at(own, field)) for field in SAME_FIELDS}
    for field in SAME_ADDITIONS:
        values = (value_at(theirs, field), value_at(own, field))
        pairs |= {field: values} if None not in values else {}
    return pairs | {"layers of the trunk": (num_trunk_layers(theirs), num_trunk_layers(own))}


def _check_width_scaling(theirs: Recipe, own: Recipe, folder: Path) -> None:
    """Refuse rates by width for weights that did not start and learn by it."""
    base, before = own.optimizer.mup_base_width, theirs.optimizer.mup_base_width
    if base is not None and base != before:
        raise CheckpointError(
            "optimizer.mup_base_width must be null, or that of the model in init.path: its initial values go with it",
            f"{base} here and {'null' if before is None else before} in {folder}",
            "Remove optimizer.mup_base_width, and choose optimizer.lr for this model",
        )


def _lacks(field: str, what: str, folder: Path) -> CheckpointError:
    return CheckpointError(
        f"with {field} init.path must be a run or a checkpoint that holds it",
        f"no {what} in {folder}",
        f"Set {field}=false, or start from the run itself",
    )


@final
class Frozen(Callback):
    """Compare what is frozen at the end of training with what it was at the start, byte for byte."""

    def __init__(self) -> None:
        self._digest = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the frozen parameters are."""
        self._digest = _frozen_digest(cast(RunStrategy, pl_module.strategy))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, before the last checkpoint is written.

        Raises:
            TrainingError: A frozen parameter has changed on some rank.
        """
        strategy = cast(RunStrategy, pl_module.strategy)
        if strategy.ranks.any(_frozen_digest(strategy) != self._digest):
            raise TrainingError(
                "frozen parameters must be the same bytes after training as before",
                "others",
                "Use the checkpoint that the run started from, and report the strategy and the head kind.",
            )


def _frozen_digest(strategy: RunStrategy) -> str:
    """Digest of this rank's part of all frozen parameters."""
    digest = hashlib.sha256()
    for shard in strategy.param_shards():
        if not shard.is_trainable:
            digest.update(shard.name.encode())
            digest.update(shard.weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
