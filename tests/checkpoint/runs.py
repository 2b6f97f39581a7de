"""Run folders with checkpoints of real models, as several ranks would have written them."""

from pathlib import Path

import safetensors.torch
import torch

from mtp_lightning.checkpoint.format.commit import save_collectively
from mtp_lightning.checkpoint.format.manifest import RunMetadata, SavePoint
from mtp_lightning.checkpoint.format.write_shards import write_pieces
from mtp_lightning.files.durable import FileRecord
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe, num_head_layers, num_trunk_layers, recipe_hash, recipe_to_yaml
from tests.checkpoint.cutting import evenly, is_equal


def model_of_step(recipe: Recipe, step: int) -> MtpModel:
    """Build the recipe's model, with noise on every parameter that tells its step."""
    model = build_model(recipe)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    return model


def save_run(run: Path, recipe: Recipe, step: int, *, num_ranks: int = 1, model: MtpModel | None = None) -> Path:
    """Add a checkpoint to a run folder; this process writes for all ranks."""
    parameters = dict((model or model_of_step(recipe, step)).named_parameters())

    def write(partial: Path) -> dict[str, FileRecord]:
        records: dict[str, FileRecord] = {}
        for rank, pieces in enumerate(evenly(parameters, num_ranks)):
            records |= write_pieces(partial, pieces, rank, num_ranks)
        return records

    facts = RunMetadata(
        recipe_hash=recipe_hash(recipe),
        num_offsets=recipe.heads.num_offsets,
        layers={"trunk": num_trunk_layers(recipe), "heads": num_head_layers(recipe)},
        world_size=num_ranks,
        strategy="single" if num_ranks == 1 else "zero3",
        recipe_text=recipe_to_yaml(recipe),
    )
    return save_collectively(Ranks(), run / "checkpoints", SavePoint(step=step, tokens=step * 64), facts, write)


def flip_a_byte(path: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of all files of a folder."""
    return {
        name: value
        for path in folder.glob("*.safetensors")
        for name, value in safetensors.torch.load_file(path).items()
    }


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equality to the bit, of types and names as well."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def is_same_model(loaded: MtpModel, expected: MtpModel) -> bool:
    """Equality of all weights to the bit, under the same names."""
    ours, theirs = dict(expected.named_parameters()), dict(loaded.named_parameters())
    return list(ours) == list(theirs) and all(is_equal(ours[name].detach(), theirs[name]) for name in ours)
