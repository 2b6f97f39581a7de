"""What training asks of a strategy besides what Lightning does."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.format.reader_view import Reader
from mtp_lightning.checkpoint.format.state_tree import read_state
from mtp_lightning.checkpoint.format.write_shards import AVERAGE
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.sequence_parallel import SequenceSlice
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.param_shards import ParamShard, RunsOf, names_of


class RunStrategy(ABC):
    """What training asks of a strategy besides what Lightning does, and checkpoints that any strategy can resume."""

    averages: Mapping[str, Tensor] = {}  # of this rank's shards, by their names; see `step/average.py`
    sequence: SequenceSlice | None = None  # of the windows, where ranks share them; the same weights and optimizer
    captured: dict[str, Any]  # Lightning's own state, from the last `save_checkpoint`

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        own: torch.device = self.root_device  # type: ignore[attr-defined]
        return own

    @property
    def ranks(self) -> Ranks:
        """The processes that train together; their tensors meet on this rank's device, whatever it holds elsewhere."""
        return Ranks(device=self.device)

    @property
    def gradient_scale(self) -> float:
        """Factor that a backward pass multiplies gradients by."""
        return 1.0

    runs_of: RunsOf | None = None  # what a flat tensor of the optimizer is a shard of; None: parameters are whole
    clips_here: bool  # False: the strategy's own optimizer step clips gradients

    @abstractmethod
    def build_model(self, recipe: Recipe) -> MtpModel:
        """Build and initialise the model, or this rank's part of it."""

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Make parameters whole on every rank inside the body, to be read."""
        return nullcontext()

    @abstractmethod
    def accumulating(self) -> AbstractContextManager[None]:
        """Surround the backward passes of one optimizer step; after it, gradients are what the optimizer will use."""

    @abstractmethod
    def param_shards(self) -> Iterator[ParamShard]:
        """Yield this rank's part of every parameter, with its gradient and moments."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Let the next optimizer step change neither weights nor moments."""

    @abstractmethod
    def fill(self, reader: Reader) -> None:
        """Take weights and moments from a checkpoint."""

    def fill_averages(self, reader: Reader) -> None:
        """Take the moving averages of weights that a checkpoint holds."""
        self.averages = {
            shard.name: reader.read(shard.name, AVERAGE, shard.start, shard.stop).to(shard.weight.device)
            for shard in self.param_shards()
            if AVERAGE in reader.kinds(shard.name)
        }

    def saved_shards(self) -> Iterator[ParamShard]:
        """Yield what a checkpoint keeps of this rank: the shards, with averages among the moments."""
        for shard in self.param_shards():
            average = self.averages.get(shard.name)
            added = {} if average is None else {AVERAGE: average}
            yield shard._replace(moments=shard.moments | added)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Yield the model's parameters under the names that checkpoints know them by."""
        return names_of(self.lightning_module)  # type: ignore[attr-defined]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: weights are saved as shards."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: moments are saved as shards."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Keep what Lightning would save; `callbacks.checkpoints` writes it, with the shards of all ranks."""
        self.captured = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Tell Lightning that shards can be filled only when weights and optimizer are there."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Tell Lightning that the moments come with the weights."""
        return False

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill weights and moments from a checkpoint folder; return Lightning's own state."""
        folder = Path(checkpoint_path)
        reader = ShardReader(folder)
        self.fill(reader)
        self.fill_averages(reader)
        return read_state(folder) | {"state_dict": {}, "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: Any = True) -> None:
        """Do nothing: weights are in place since `load_checkpoint`."""
        return
