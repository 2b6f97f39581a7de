"""Heads on an imported model that are fitted in closed form to a little text, before the folder is written."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.load_model import fill
from mtp_lightning.checkpoint.huggingface.tensor_plan import Origin
from mtp_lightning.checkpoint.huggingface.weights import IncomingWeights
from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.factory import open_rows, prepare_data
from mtp_lightning.data.shards.manifest import MANIFEST_NAME
from mtp_lightning.errors import CheckpointError, DataError
from mtp_lightning.files.paths import expanded
from mtp_lightning.model.fit_heads import fit_heads
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.planner.machine_memory import host_bytes
from mtp_lightning.recipe import Recipe

DEFAULT_TEXT = ("stdlib:asyncio", "stdlib:email", "stdlib:http", "stdlib:unittest", "stdlib:xml")
"""Half a million tokens that are wherever Python is."""
FITTED_KINDS = ("sequential", "recursive", "linear")
TOKENS_PER_WIDTH = 32
"""Tokens of text for each channel of a state: a module's map has 2 D inputs."""


class CannotFitError(CheckpointError):
    """There is no text for the model, no memory, or no solution."""


def fitted_heads(weights: IncomingWeights, tokenizer: Path | None, sources: Sequence[str]) -> IncomingWeights:
    """Give the heads of an import the maps that fit a little text best; the model itself is not changed.

    All of the model lies in memory for a while, in the type of its weights, and the text's states beside it.

    Args:
        weights: what is imported, with copied layers in its heads.
        tokenizer: the model's.
        sources: texts as `mtp data build` takes them, or one folder of shards; parts of Python's standard library if
            empty.

    Raises:
        CannotFitError: the model does not fit into memory, there is neither a tokenizer nor shards, or the model's
            states are not finite numbers.
        DataError: a source cannot be read.
    """
    recipe = weights.recipe
    num_kept = (recipe.heads.num_offsets + 3) * TOKENS_PER_WIDTH * recipe.model.hidden_size**2
    needed = (sum(math.prod(weights.shape(name)) for name in weights.names) + num_kept) * weights.dtype.itemsize
    if needed > host_bytes():
        raise CannotFitError(
            "a model whose heads are fitted must fit into memory",
            f"{needed / 1e9:,.1f} GB needed, {host_bytes() / 1e9:,.1f} GB there",
            "Choose --init copy, which reads the weights tensor by tensor",
        )
    rows = _rows(recipe, tokenizer, sources)
    with torch.device("meta"):
        model = MtpModel(recipe)
    model.to(torch.float32 if weights.dtype is torch.float16 else weights.dtype).to_empty(device="cpu")
    model.tie_word_embeddings()
    fill(model, weights, lambda _: None)
    made = fit_heads(model.eval(), *rows)
    if not all(bool(torch.isfinite(matrix).all()) for matrix in made.values()):
        raise CannotFitError(
            "the states of a model whose heads are fitted must be finite numbers, and not all zero",
            f"no solution on {rows[0].numel():,} tokens",
            "Choose --init copy, or longer text; if the model writes no text either, its weights are damaged",
        )
    say(f"  fitted to {rows[0].numel():,} tokens of {', '.join(sources or DEFAULT_TEXT)}")
    origins = weights.plan.origins | {name: Origin("fitted", None) for name in made}
    return replace(
        weights, plan=replace(weights.plan, origins=origins), made={n: m.to(weights.dtype) for n, m in made.items()}
    )


def _rows(recipe: Recipe, tokenizer: Path | None, sources: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Read rows of text, spread evenly: `tokens` and `documents`, both (B, T+n)."""
    is_built = len(sources) == 1 and (Path(expanded(sources[0])) / MANIFEST_NAME).is_file()
    if tokenizer is None and not is_built:
        raise CannotFitError(
            "heads can be fitted where text can be read",
            "no tokenizer in the folder, and no shards",
            "Give shards of the model's ids with --fit-on, or choose --init copy",
        )
    data: dict[str, Any] = {"shards": sources[0]} if is_built else {"corpus": [*sources] or [*DEFAULT_TEXT]}
    if tokenizer is not None:
        data["tokenizer"] = str(tokenizer)
    with tempfile.TemporaryDirectory(prefix="mtp-fit-") as folder:
        sections = {
            "data": recipe.data.model_copy(update=data),
            "run": recipe.run.model_copy(update={"cache": folder}),
        }
        there = recipe.model_copy(update=sections)
        if not is_built:
            prepare_data(there)
        found = open_rows(there, "train")
        if not len(found):
            raise DataError("text to fit heads to must fill a row", "none", "Give more text with --fit-on")
        wanted = -(-TOKENS_PER_WIDTH * recipe.model.hidden_size // recipe.data.seq_len)
        rows = found.read_known(found.spread(min(wanted, len(found))), recipe.model.vocab_size)
        return torch.from_numpy(rows["tokens"].astype("int64")), torch.from_numpy(rows["documents"].astype("int64"))
