"""How an exported folder is heard by others: loaded as its reader does, asked for scores, a text and kept drafts.

`mtp export --verify` compares what is heard with the model that was exported (`evaluation.export_parity`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
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
    accepted: list[int] | None = None  # drafts kept in every verifying step but the last, which may be cut


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
    hf_checkpoint = open_folder(folder, family="transformers" if recipe.model.is_foreign else None)
    native = hf_checkpoint.native
    heads = {"layers_from_trunk": False, **(native.heads if native else {}), "num_offsets": 1}
    if native:
        is_unrolled = recipe.heads.kind == "recursive"
        heads["num_offsets"] = recipe.heads.num_offsets if is_unrolled else 1 + native.count
        heads["kind"] = recipe.heads.kind
    section = hf_checkpoint.section.model_dump(exclude_defaults=hf_checkpoint.section.is_foreign)
    data = {"seq_len": recipe.data.seq_len, "document_mask": recipe.data.document_mask}
    read = Recipe.model_validate({"model": section, "heads": heads, "data": data})
    return model_of(read, IncomingWeights(hf_checkpoint, plan_import(hf_checkpoint, read, "native", ()), read))


def heard_by_transformers(folder: Path, probe: Probe) -> Heard | str:
    """Open a folder as `AutoModelForCausalLM` does, and let it speak.

    Code that an export has put into the folder is run; where it, or transformers itself, drafts with the heads, the
    drafts that every step keeps are counted.
    """
    try:
        theirs = library()
    except CheckpointError as missing:
        return missing.found
    told = theirs.PreTrainedConfig.get_config_dict(folder)[0]
    if told.get("model_type") not in theirs.CONFIG_MAPPING:
        return f"transformers {theirs.__version__} has no class for it"
    has_code = "auto_map" in told
    model = _loaded(theirs, folder, has_code=has_code)
    with _quiet(theirs), torch.no_grad():
        logits = model(torch.tensor([probe.text])).logits[0].float()
        text, accepted = _said(model, probe, use_mtp=has_code)
    name = f"transformers {theirs.__version__} ({type(model).__name__})"
    return Heard(judge=name, logits=logits, text=text, accepted=accepted if has_code else None)


def _loaded(theirs: Any, folder: Path, *, has_code: bool) -> Any:
    version = f"transformers {theirs.__version__}"
    try:
        with _quiet(theirs):
            model, told = theirs.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=has_code,
            )
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        hint = "Leave --verify out, or export with --format consolidated"
        raise CheckpointError(f"{version} must be able to open the folder", found, hint) from error
    if lost := [*told["missing_keys"], *told["mismatched_keys"]]:
        hint = "Export with --format consolidated"
        raise CheckpointError(f"{version} must find every weight that it needs", f"none for {lost}", hint)
    model.eval().generation_config.eos_token_id = None
    return model


def _said(model: Any, probe: Probe, *, use_mtp: bool) -> tuple[list[int], list[int]]:
    """Let a model go on from the prompt; return its text, and the drafts kept by every step but the last."""
    lengths: list[int] = []

    def note(_: Any, inputs: Any, options: dict[str, Any]) -> None:
        past = options.get("past_key_values")
        lengths.append(past.get_seq_length() if past is not None else 0)

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    options = {"use_mtp": True} if use_mtp else {}
    try:
        said = model.generate(torch.tensor([probe.prompt]), max_new_tokens=probe.num_tokens, do_sample=False, **options)
    finally:
        hook.remove()
    steps = lengths[1:]  # the first forward reads the prompt
    return said[0, len(probe.prompt) :].tolist(), [after - before - 1 for before, after in pairwise(steps)]


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
