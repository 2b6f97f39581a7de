"""Our own model of a folder that was written for an engine: every rewriting is undone, for `--verify`."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mtp_lightning.checkpoint.export.drafters import (
    BLOCKS,
    DRAFTER,
    EMBEDDING,
    MATRICES,
    NORM,
    OFFSETS,
    WIDENED,
)
from mtp_lightning.checkpoint.export.judges import model_of, reread_by_import
from mtp_lightning.checkpoint.export.rewritten import RewrittenWeights, computed, read_whole
from mtp_lightning.checkpoint.export.trunk import sources_of
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.huggingface.canonical_names import EXTRA, num_base_layers, parameters_of
from mtp_lightning.checkpoint.huggingface.folder import changed, open_folder
from mtp_lightning.checkpoint.huggingface.modules import QWEN
from mtp_lightning.checkpoint.huggingface.tensor_plan import plan_import
from mtp_lightning.checkpoint.huggingface.weights import IncomingWeights
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe


def reread_qwen3_5(folder: Path, recipe: Recipe) -> MtpModel:
    """Read a trunk and its module out of Qwen3.5's layout."""
    if recipe.model.is_foreign:
        return reread_by_import(folder, recipe)
    stored = ShardReader(folder)
    read = _with_first(recipe, hidden="post_norm", concatenation="embedding_first", draft_vocabulary=None)
    if "lm_head.weight" in stored.names:
        read = read.model_copy(update={"model": read.model.model_copy(update={"tie_word_embeddings": False})})
    parameters = parameters_of(read)
    sources = sources_of(read, parameters, "llama", QWEN)
    made = {name: computed(parameters[name].shape, _plain(stored, one.stored)) for name, one in sources.items()}
    return model_of(read, RewrittenWeights(stored, made))


def _plain(stored: ShardReader, name: str) -> Callable[[], Tensor]:
    """Undo what `qwen3_5` does to a tensor."""

    def make() -> Tensor:
        whole = read_whole(stored, name)
        if whole.dim() == 1:
            return whole + 1
        if name.endswith("q_proj.weight"):
            num_heads = whole.shape[0] // stored.shape(name.replace("q_proj", "q_norm"))[0] // 2
            return whole.view(num_heads, 2, -1, whole.shape[1])[:, 0].flatten(0, 1)
        return whole / 2 if name.endswith("o_proj.weight") else whole

    return make


def reread_drafter(folder: Path, recipe: Recipe) -> MtpModel:
    """Import the trunk, and take the heads from the drafter beside it."""
    hf_checkpoint, drafter = open_folder(folder), ShardReader(folder / DRAFTER)
    is_eagle = "fc.weight" in drafter.names
    fewer = {} if is_eagle else {"draft_vocabulary": None}
    is_one = is_eagle and not _is_on_the_way(recipe)
    read = _with_first(recipe) if is_one else _with(recipe, recipe.heads.num_offsets, **fewer)
    read = read.model_copy(update={"model": hf_checkpoint.section})
    trunk = IncomingWeights(hf_checkpoint, plan_import(hf_checkpoint, read, "random", ()), read)
    made = {}
    for name, (place, shape, _) in parameters_of(read).items():
        found = _in_eagle(name, place, drafter) if is_eagle else _in_medusa(name, read, drafter, trunk)
        if found is not None:
            made[name] = computed(shape, _in_rows(found, shape, _drafted(drafter)))
    return model_of(read, RewrittenWeights(trunk, made))


def _drafted(drafter: ShardReader) -> Tensor | None:
    """Read which ids the rows of a drafter's matrices score; None where these are all."""
    if OFFSETS in drafter.names:
        offsets = drafter.read(OFFSETS)
        return offsets + torch.arange(len(offsets))
    return None


def _in_rows(make: Callable[[], Tensor], shape: tuple[int, ...], ids: Tensor | None) -> Callable[[], Tensor]:
    """Put the rows of a matrix (V', D) into one of all ids, where fewer are stored."""

    def spread() -> Tensor:
        rows = make()
        if ids is None or rows.shape == shape:
            return rows
        return torch.zeros(shape, dtype=rows.dtype).index_copy(0, ids, rows)

    return spread


def _in_eagle(name: str, place: str | None, drafter: ShardReader) -> Callable[[], Tensor] | None:
    """Find a parameter of the second offset."""
    if name == f"{MATRICES}1.weight":
        return lambda: read_whole(drafter, "lm_head.weight")
    if name == f"{BLOCKS}0.weight":
        return lambda: read_whole(drafter, "fc.weight")
    if (extra := EXTRA.fullmatch(place or "")) is None:
        return None
    stored = f"midlayer.{extra[3]}" if extra[2] == "0" else f"layers.{extra[2]}.{extra[3]}"
    stored = stored.replace("midlayer.input_layernorm", "midlayer.hidden_norm")
    return lambda: read_whole(drafter, stored).chunk(2, -1)[1] if stored in WIDENED else read_whole(drafter, stored)


def _in_medusa(name: str, recipe: Recipe, drafter: ShardReader, trunk: IncomingWeights) -> Callable[[], Tensor] | None:
    """Find a parameter of a head."""
    heads = recipe.heads
    if name.startswith(BLOCKS):
        inside = name.removeprefix(BLOCKS)
        if heads.kind == "medusa":
            return lambda: read_whole(drafter, inside)
        return lambda: _map_in(read_whole(drafter, inside.replace(".", ".1.")), trunk)
    number = name.removeprefix(MATRICES).removesuffix(".weight")
    if number.isdecimal() and number != "0":
        return lambda: read_whole(drafter, f"{int(number) - 1}.{heads.layers_per_head}.weight")
    return None


def _map_in(product: Tensor, trunk: IncomingWeights) -> Tensor:
    """Solve U diag(w) W diag(1/w) = M for the map W of a linear head."""
    matrix = f"{MATRICES}0.weight" if f"{MATRICES}0.weight" in trunk.names else EMBEDDING
    norm, rows = read_whole(trunk, NORM), read_whole(trunk, matrix)
    if rows.shape[0] < rows.shape[1]:
        raise CheckpointError(
            "--verify finds the map of a linear head in medusa's matrices where they have a row for each channel",
            f"{rows.shape[0]} rows of {rows.shape[1]} channels",
            "Leave --verify out, or export with --format eagle",
        )
    solution: Tensor = torch.linalg.lstsq(rows * norm, product * norm).solution
    return solution


def _is_on_the_way(recipe: Recipe) -> bool:
    """Tell whether the layers of all heads are the next-token model's own."""
    return recipe.heads.kind == "chained" and recipe.heads.order == "anticausal"


def _with(recipe: Recipe, num_offsets: int, **heads: str | None) -> Recipe:
    """Describe the model with some of its offsets, its layers counted as the next-token model's."""
    num_layers = num_base_layers(parameters_of(recipe), recipe.model)
    told = {"num_offsets": num_offsets, "layers_from_trunk": _is_on_the_way(recipe), **heads}
    sections = {
        "model": changed(recipe.model, num_hidden_layers=num_layers),
        "heads": recipe.heads.model_copy(update=told),
    }
    return recipe.model_copy(update=sections)


def _with_first(recipe: Recipe, **heads: str | None) -> Recipe:
    """Describe the model with its second offset alone; a module that is unrolled is the same for all."""
    return _with(recipe, recipe.heads.num_offsets if recipe.heads.kind == "recursive" else 2, **heads)
