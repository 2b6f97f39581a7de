"""How an exported folder is heard by others: loaded as its reader does, asked for scores, a text and kept drafts.

`mtp export --verify` compares what is heard with the model that was exported (`evaluation.export_parity`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.load_model import fill
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.checkpoint.huggingface.folder import open_folder
from mtp_lightning.checkpoint.huggingface.tensor_plan import plan_import
from mtp_lightning.checkpoint.huggingface.weights import IncomingWeights
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.transformers_library import library
from mtp_lightning.recipe import Recipe


@dataclass(frozen=True)
class Probe:
    """What a judge is asked."""

    prompt: list[int]
    text: list[int]  # (T,) ids to score: the prompt, and what the exported model says after it
    num_tokens: int  # how many new ones to say, greedily, no end of text minded


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a judge has found; None is what it cannot tell."""

    judge: str  # name and version
    logits: Tensor  # (T, V) of `Probe.text`, fp32, of the next token
    text: list[int]  # new tokens
    accepted: list[int] | None = None  # drafts kept in every verifying step
    num_steps: int | None = None  # verifying steps


Judge = Callable[[Path, Probe], Heard | str]
"""Loads a folder in fp32 on the CPU; returns a reason where it cannot judge here, as an engine that is missing."""
Reread = Callable[[Path, Recipe], MtpModel]
"""Builds our own model, heads included, of nothing but a written folder; the recipe says how many heads to look for."""


def model_of(recipe: Recipe, weights: WeightSource, *, dtype: torch.dtype = torch.float32) -> MtpModel:
    """Build a model in fp32 of weights that are rounded to a type."""
    with torch.device("meta"):
        model = MtpModel(recipe)
    model.to(dtype).to_empty(device="cpu")
    model.tie_word_embeddings()
    fill(model, weights, lambda num_bytes: None)
    return model.float().eval().requires_grad_(requires_grad=False)


def reread_by_import(folder: Path, recipe: Recipe) -> MtpModel:
    """Read a folder as `mtp import` does.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
    """
    hf_checkpoint = open_folder(folder)
    native = hf_checkpoint.native
    heads = {"layers_from_trunk": False, **(native.heads if native else {}), "num_offsets": 1}
    if native:
        is_unrolled = recipe.heads.kind == "recursive"
        heads["num_offsets"] = recipe.heads.num_offsets if is_unrolled else 1 + native.count
        heads["kind"] = recipe.heads.kind
    section = hf_checkpoint.section.model_dump(exclude_defaults=hf_checkpoint.section.is_foreign)
    read = Recipe.model_validate({"model": section, "heads": heads, "data": {"seq_len": recipe.data.seq_len}})
    return model_of(read, IncomingWeights(hf_checkpoint, plan_import(hf_checkpoint, read, "native", ()), read))


def heard_by_transformers(folder: Path, probe: Probe) -> Heard | str:
    """Open a folder as `AutoModelForCausalLM` does, and let it speak; its heads, if any, lie idle."""
    try:
        theirs = library()
    except CheckpointError as missing:
        return f"{missing.found}"
    if theirs.PreTrainedConfig.get_config_dict(folder)[0].get("model_type") not in theirs.CONFIG_MAPPING:
        return f"transformers {theirs.__version__} has no class for it"
    try:
        with _quiet(theirs):
            model, told = theirs.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        hint = "Leave --verify out, or export with --format consolidated"
        raise CheckpointError(
            f"transformers {theirs.__version__} must be able to open the folder", found, hint
        ) from error
    if lost := [*told["missing_keys"], *told["mismatched_keys"]]:
        expected, hint = "transformers must find every weight that it needs", "Export with --format consolidated"
        raise CheckpointError(expected, f"none for {lost}", hint)
    model.eval().generation_config.eos_token_id = None
    with torch.no_grad():
        logits = model(torch.tensor([probe.text])).logits[0].float()
        said = model.generate(torch.tensor([probe.prompt]), max_new_tokens=probe.num_tokens, do_sample=False)
    name = f"transformers {theirs.__version__} ({type(model).__name__})"
    return Heard(judge=name, logits=logits, text=said[0, len(probe.prompt) :].tolist())


@contextmanager
def _quiet(theirs: Any) -> Iterator[None]:
    """Keep bars and tables of the library off the screen; what they tell is checked."""
    logging, level = theirs.utils.logging, theirs.utils.logging.get_verbosity()
    has_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
