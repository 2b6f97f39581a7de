"""One device, and nothing sharded."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import final

from lightning.pytorch.strategies import SingleDeviceStrategy

from mtp_lightning.checkpoint.format.reader_view import Reader
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.base import RunStrategy
from mtp_lightning.training.strategies.param_shards import ParamShard, check_names, provide_moments, whole_shards


@final
class SingleStrategy(RunStrategy, SingleDeviceStrategy):
    """One device and torch's own optimizer step."""

    clips_here = True

    def build_model(self, recipe: Recipe) -> MtpModel:
        """Build the whole model on the CPU; Lightning moves it."""
        return build_model(recipe)

    def accumulating(self) -> AbstractContextManager[None]:
        """Let autograd add the gradients up."""
        return nullcontext()

    def param_shards(self) -> Iterator[ParamShard]:
        """Yield every parameter whole."""
        return whole_shards(self.named_parameters(), self.optimizers[0])

    def discard_gradients(self) -> None:
        """Take the gradients away: an optimizer of torch passes over parameters without."""
        self.optimizers[0].zero_grad(set_to_none=True)

    def fill(self, reader: Reader) -> None:
        """Read every parameter whole."""
        check_names(reader, self.named_parameters())
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                provide_moments(self.optimizers[0], parameter, reader, name)
        for shard in self.param_shards():
            shard.read_from(reader)
