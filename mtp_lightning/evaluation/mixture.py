"""What heads have learnt to read of the trunk: the shares of its layers in each head's mixture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.manifest import RECIPE_NAME
from mtp_lightning.console.plots import save_picture
from mtp_lightning.errors import CheckpointError
from mtp_lightning.recipe.trainable import mixing_offsets


@dataclass(frozen=True)
class LearntMixture:
    """How much one offset reads of each layer."""

    offset: int
    shares: list[float]  # of layers 1 to L of the trunk; they sum to one

    @property
    def depth(self) -> float:
        """Where the head reads on average: 1 is the first layer, L the last.

        >>> LearntMixture(2, [0.5, 0.0, 0.5]).depth
        2.0
        """
        return sum(number * share for number, share in enumerate(self.shares, start=1))


def read_mixtures(path: Path) -> list[LearntMixture]:
    """Read the mixtures of a run, a checkpoint or an exported folder; nothing else of the model.

    Raises:
        CheckpointError: there is no checkpoint, or its heads read no mixtures.
    """
    folder = open_checkpoint(path, verify=False)
    recipe, reader = folder.recipe, folder.reader
    section = recipe.adapt.layer_mix
    if section is None:
        raise CheckpointError(
            "a run whose mixtures are shown must have adapt.layer_mix",
            f"adapt.layer_mix = null in {folder.path / RECIPE_NAME}",
            "Name a run that was trained with them",
        )
    weights = {offset: reader.read(f"layer_mix.{offset}.weight").double() for offset in mixing_offsets(recipe)}
    return [LearntMixture(k, (weight / section.temperature).softmax(0).tolist()) for k, weight in weights.items()]


def draw(mixtures: Sequence[LearntMixture], path: Path) -> None:
    """Draw the shares of all layers, a line for each offset, against what they started as."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    num_layers = len(mixtures[0].shares)
    for mixture in mixtures:
        axes.plot(range(1, num_layers + 1), mixture.shares, marker="o", label=f"offset {mixture.offset}")
    axes.axhline(1 / num_layers, linestyle=":", color="grey", label="at the start")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="What each head reads of the trunk", xlabel="layer", ylabel="share", ylim=(0, 1))
    axes.legend()
    save_picture(figure, path, "--plot")
