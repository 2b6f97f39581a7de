"""Where a model commits to the next token: every layer's state read as if it were the last [Mehra 2025, section 2.4].

The logit lens of layer l is softmax(unembedding(norm(z_l))). Its KL from the final distribution falls to zero at the
last layer; how early it falls says how many layers are left that already serve the next token alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.manifest import RECIPE_NAME
from mtp_lightning.console.plots import save_picture
from mtp_lightning.decode.state import main_path
from mtp_lightning.errors import CheckpointError
from mtp_lightning.evaluation.marginal import held_out_texts
from mtp_lightning.model.layers import layers_of
from mtp_lightning.model.mtp_model import MtpModel
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


LEAST_TOKENS = 8


@dataclass(frozen=True)
class LayerView:
    """One layer's state, read as the last."""

    depth: float  # l / L, the layers of the main head counted
    kl: float  # of the final distribution from this layer's, in nats: sum of p_l log(p_l / p_final)
    agreement: float  # share of positions whose likeliest token is already the final one


@dataclass(frozen=True)
class LensReport:
    """A model seen layer by layer, the embedding first."""

    recipe: str
    num_positions: int
    layers: tuple[LayerView, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values to be written to a file."""
        return asdict(self)


@torch.no_grad()
def measure_lens(path: Path, *, num_samples: int = 32, device: str = "cpu") -> LensReport:
    """Measure a model on held-out texts.

    Raises:
        CheckpointError: There is nothing to load.
        DataError: No held-out text is long enough.
    """
    recipe, model = load_model(path, device=device)
    sums: list[list[float]] = []
    num_positions = 0
    for text in held_out_texts(recipe, num_samples, LEAST_TOKENS):
        states = layer_states(model, text)
        final = model.unembedding.logits(1, states[-1]).double().log_softmax(-1)  # (1, T, V)
        sums.append([value for state in states for value in _compared(model, state, final)])
        num_positions += final.shape[1]
    means = (torch.tensor(sums, dtype=torch.float64).sum(0) / num_positions).view(-1, 2).tolist()
    depth = len(means) - 1
    return LensReport(
        recipe.name, num_positions, tuple(LayerView(layer / depth, *values) for layer, values in enumerate(means))
    )


def layer_states(model: MtpModel, text: list[int]) -> list[Tensor]:
    """Return the embedding and the output of every layer on the way to the main head, each (1, T, D)."""
    device = model.trunk.embed_tokens.weight.device
    tokens = torch.tensor([text + [0] * model.num_offsets], device=device)
    with _recorded(model) as states:
        hidden = model.hidden_states(tokens, torch.zeros_like(tokens), offsets=main_path(model))
    assert torch.equal(states[-1], hidden[1])
    return [model.trunk.embed_tokens(tokens[:, : len(text)]), *states]


@contextmanager
def _recorded(model: MtpModel) -> Iterator[list[Tensor]]:
    """Collect what the layers of trunk and main head put out while the body runs."""
    states: list[Tensor] = []
    owners = [model.trunk, *(module for offset in main_path(model) for module in model.heads.modules_of(offset))]
    layers = [layer for owner in owners for layer in layers_of(owner)]

    def keep(_layer: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])  # some return more than their state

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _compared(model: MtpModel, state: Tensor, final: Tensor) -> tuple[float, float]:
    """Sums over positions of the KL from the final distribution and of agreements."""
    seen = model.unembedding.logits(1, state).double().log_softmax(-1)
    kl = (seen.exp() * (seen - final)).sum()
    return float(kl), float((seen.argmax(-1) == final.argmax(-1)).sum())


def draw_lens(report: LensReport, path: Path) -> None:
    """Draw KL and agreement over depth.

    Raises:
        RunFolderError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.subplots()
    right = left.twinx()
    depths = [layer.depth for layer in report.layers]
    left.plot(depths, [layer.kl for layer in report.layers], color="#0072B2", marker="o")
    left.title.set_parse_math(False)  # a name may hold dollar signs
    left.set(xlabel="depth l / L", ylim=(0, None), title=f"{report.recipe}: where it commits to the next token")
    left.set_ylabel("KL from the final distribution, nats", color="#0072B2")
    right.plot(depths, [layer.agreement for layer in report.layers], color="#D55E00", marker="s")
    right.set_ylabel("same likeliest token", color="#D55E00")
    right.set_ylim(0, 1)
    save_picture(figure, path, "--plot")
