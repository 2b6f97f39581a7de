"""From a folder to a model that can be used: whole, checked, every tensor in its place."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mtp_lightning.checkpoint.format.carried_files import with_own_tokenizer
from mtp_lightning.checkpoint.format.folder import CheckpointFolder, open_checkpoint
from mtp_lightning.checkpoint.format.read_shards import MOST_NAMES, ShardReader
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.console.progress import watched
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, verify: bool = True
) -> tuple[Recipe, MtpModel]:
    """Load the recipe and the trained model of a run, a checkpoint or an exported folder, to be used, not trained.

    The recipe names the tokenizer beside the weights where the one that it was trained with is gone.

    Args:
        path: run folder (its newest complete checkpoint is taken), checkpoint folder, or exported folder.
        device: where the model shall lie; beside it, 4 MiB blocks lie in CPU memory.
        dtype: type of every parameter; None takes the type that is stored.
        verify: compare digests with the manifest; costs one more read of the weights.

    Raises:
        CheckpointError: there is nothing to load, it is damaged, or its tensors are not those of its recipe.
    """
    folder = open_checkpoint(path, verify=verify)
    return with_own_tokenizer(folder.recipe, folder.path), build_trained(folder, device=device, dtype=dtype)


def build_trained(
    folder: CheckpointFolder, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> MtpModel:
    """Build the model of an opened folder, as `load_model` does.

    Raises:
        CheckpointError: the tensors are not those of the recipe.
    """
    with watched(f"Loading {folder.path.name}", total_bytes=folder.model_bytes, show=True) as advance:
        model = _empty_model(folder, device=device, dtype=dtype)
        fill(model, folder.reader, advance)
    return model.eval().requires_grad_(requires_grad=False)


def _empty_model(folder: CheckpointFolder, *, device: torch.device | str, dtype: torch.dtype | None) -> MtpModel:
    model = check_tensors(folder)
    model.to(dtype or stored_dtype(folder.reader)).to_empty(device=device)
    model.tie_word_embeddings()
    return model


def check_tensors(folder: CheckpointFolder) -> MtpModel:
    """Check that a folder holds the parameters of its recipe's model, in their shapes, and nothing else.

    Returns:
        The model, on the device meta.

    Raises:
        CheckpointError: names what lacks, what is too much, and what has another shape.
    """
    reader = folder.reader
    with torch.device("meta"):
        model = MtpModel(folder.recipe)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = {name: reader.shape(name) for name in reader.names}
    shapes = [
        f"{name} {list(stored[name])} instead of {list(wanted[name])}"
        for name in wanted.keys() & stored.keys()
        if stored[name] != wanted[name]
    ]
    faults: Mapping[str, list[str]] = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "unused": sorted(stored.keys() - wanted.keys()),
        "of another shape": sorted(shapes),
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in faults.items() if names)
        raise CheckpointError(
            "the tensors of a checkpoint must be those of its recipe's model",
            f"{found}; in {folder.path}",
            "Use the version of mtp_lightning that wrote it, and leave its recipe.yaml as it was",
        )
    return model


def stored_dtype(reader: ShardReader) -> torch.dtype:
    """Return the type that every stored weight fits into."""
    return functools.reduce(torch.promote_types, (reader.dtype(name) for name in reader.names))


@torch.no_grad()
def fill(model: MtpModel, weights: WeightSource, advance: Callable[[int], None]) -> None:
    """Copy weights into a model block by block; `advance` is told of bytes read."""
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        for start, values in weights.blocks(name):
            flat[start : start + values.numel()].copy_(values)
            advance(values.nbytes)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
