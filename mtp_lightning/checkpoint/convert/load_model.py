"""From a folder to a model that can be used: whole, checked, every tensor in its place."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from mtp_lightning.checkpoint.convert.config_json import CONFIG_NAME, read_config
from mtp_lightning.checkpoint.format.layout import check_digests, check_files, check_sizes, named_checkpoints
from mtp_lightning.checkpoint.format.manifest import MANIFEST_NAME, RECIPE_NAME, DamagedCheckpointError
from mtp_lightning.checkpoint.format.read_shards import MOST_NAMES, ShardReader
from mtp_lightning.console.progress import say, watched
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import FileRecord
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe, load_recipe
from mtp_lightning.recipe.schema.phases import FOLDER


def find_checkpoint(path: Path) -> Path:
    """Find the folder to read: of a run folder its newest complete checkpoint, else the folder itself.

    Of a run in phases it is that of the last phase that has any.

    Checkpoints that are passed over because a file is missing or has a wrong size are named in a printed line.

    Raises:
        CheckpointError: this is neither a run, nor a checkpoint, nor an exported folder; or a run without a
            complete checkpoint.
    """
    path = _last_phase(path.resolve())
    if (path / MANIFEST_NAME).is_file() or (path / CONFIG_NAME).is_file():
        return path
    folder = path / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(
            "the path must be a run folder, a checkpoint folder or an exported folder",
            f"neither checkpoints/ nor {MANIFEST_NAME} nor {CONFIG_NAME} in {path}"
            if path.is_dir()
            else f"no folder {path}",
            "Give the run.dir of a run, one of its checkpoints/step-*, or what `mtp export` wrote",
        )
    reasons = []
    for checkpoint in reversed(named_checkpoints(folder)):
        try:
            check_sizes(checkpoint)
        except CheckpointError as error:
            say(f"Passing over {checkpoint.name}: {error.found}", stderr=True)
            reasons.append(error.found)
        else:
            return checkpoint
    raise CheckpointError(
        "a run folder must have a complete checkpoint",
        "; ".join(reasons) or f"none in {folder}",
        "Let the run go on until its first checkpoint (checkpoint.every_steps)",
    )


def _last_phase(path: Path) -> Path:
    """Return of a run in phases the last that has a checkpoint, else the path itself."""
    begun = [saved.parents[1] for saved in path.glob(f"{FOLDER}/*/checkpoints/step-*")]
    return max(begun, key=lambda phase: int(phase.name.partition("-")[0]), default=path)


def model_files(folder: Path) -> dict[str, FileRecord]:
    """Check that every file of a checkpoint or exported folder is there in its size; return those of the model.

    Raises:
        DamagedCheckpointError: names the file and what differs.
    """
    if (folder / MANIFEST_NAME).is_file():
        files = check_sizes(folder).files
    else:
        files = read_config(folder).files
        check_files(folder, files)
    if RECIPE_NAME not in files:
        raise DamagedCheckpointError(
            "a folder to load a model from must hold the recipe", f"no {RECIPE_NAME} in {folder}", "Use another one"
        )
    return {name: record for name, record in files.items() if name.startswith("model") or name == RECIPE_NAME}


@contextmanager
def offering_another(folder: Path) -> Iterator[None]:
    """Let an error about a damaged checkpoint name the good one before it, if there is one."""
    try:
        yield
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(error.expected, error.found, _offer(folder) or error.hint) from None


def _offer(folder: Path) -> str | None:
    """Name the newest checkpoint before this one whose model is as it was written."""
    if folder not in (beside := named_checkpoints(folder.parent)):
        return None
    for path in reversed(beside[: beside.index(folder)]):
        try:
            check_digests(path, model_files(path))
            ShardReader(path)
        except CheckpointError:
            continue
        return f"The checkpoint before it is good: {path}"
    return "No good checkpoint lies before it in the run"


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, verify: bool = True
) -> tuple[Recipe, MtpModel]:
    """Load the recipe and the trained model of a run, a checkpoint or an exported folder, to be used, not trained.

    Args:
        path: run folder (its newest complete checkpoint is taken), checkpoint folder, or exported folder.
        device: where the model shall lie; beside it, 4 MiB blocks lie in CPU memory.
        dtype: type of every parameter; None takes the type that is stored.
        verify: compare digests with the manifest; costs one more read of the weights.

    Raises:
        CheckpointError: there is nothing to load, it is damaged, or its tensors are not those of its recipe.
    """
    folder = find_checkpoint(Path(path))
    with offering_another(folder):
        files = model_files(folder)
        total_bytes = sum(record.size_bytes for record in files.values())
        with watched(f"Loading {folder.name}", total_bytes=(1 + verify) * total_bytes, show=True) as advance:
            if verify:
                check_digests(folder, files, advance)
            recipe, reader = load_recipe(folder / RECIPE_NAME).recipe, ShardReader(folder)
            model = _empty_model(recipe, reader, device=device, dtype=dtype)
            _fill(model, reader, advance)
    return recipe, model.eval().requires_grad_(requires_grad=False)


def _empty_model(
    recipe: Recipe, reader: ShardReader, *, device: torch.device | str, dtype: torch.dtype | None
) -> MtpModel:
    with torch.device("meta"):
        model = MtpModel(recipe)
    check_tensors(model, reader)
    model.to(dtype or stored_dtype(reader)).to_empty(device=device)
    model.tie_word_embeddings()
    return model


def check_tensors(model: MtpModel, reader: ShardReader) -> None:
    """Check that a checkpoint holds the parameters of a model, in their shapes, and nothing else.

    Raises:
        CheckpointError: names what lacks, what is too much, and what has another shape.
    """
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
            f"{found}; in {reader.folder}",
            "Use the version of mtp_lightning that wrote it, and leave its recipe.yaml as it was",
        )


def stored_dtype(reader: ShardReader) -> torch.dtype:
    """Return the type that every stored weight fits into."""
    return functools.reduce(torch.promote_types, (reader.dtype(name) for name in reader.names))


@torch.no_grad()
def _fill(model: MtpModel, reader: ShardReader, advance: Callable[[int], None]) -> None:
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        for start, values in reader.blocks(name):
            flat[start : start + values.numel()].copy_(values)
            advance(values.nbytes)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
