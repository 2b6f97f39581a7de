"""Use a trained model from Python: load it, generate with it, save one that a Trainer of the user's own has trained.

`import mtp_lightning` offers what is here and loads nothing heavy before it is used.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final, overload

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert import load_model as loading
from mtp_lightning.checkpoint.convert.consolidate import check_target, name_of, write_whole
from mtp_lightning.checkpoint.format.carried_files import all_end_ids, copy_files, files_of_model
from mtp_lightning.checkpoint.format.manifest import RECIPE_NAME, Provenance, write_config
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.data.tokenizers.base import Tokenizer
from mtp_lightning.decode import Settings, Statistics
from mtp_lightning.decode import generate as generate_tokens
from mtp_lightning.decode.packed_linear import pack_linear_maps
from mtp_lightning.decode.text_stream import detokenizer, text_stream
from mtp_lightning.errors import CheckpointError, DecodingError
from mtp_lightning.files.atomic_folder import atomic_folder
from mtp_lightning.files.durable import write_durably
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe import Recipe, recipe_to_yaml
from mtp_lightning.training.lightning_module import MtpLightningModule

BLOCK_ENTRIES = 2**20  # of a parameter that are written at a time


@final
@dataclass(frozen=True)
class TextModel:
    """A model with the recipe and the tokenizer that belong to it."""

    recipe: Recipe
    model: MtpModel
    tokenizer: Tokenizer
    folder: Path | None = None  # that it was loaded from


@final
@dataclass(frozen=True)
class GeneratedText:
    """A continuation of one prompt.

    Attributes:
        text: the new text, without the prompt.
        tokens: its token ids; the last may be the end of the document.
        statistics: drafted and accepted tokens of the call, over all its prompts.
    """

    text: str
    tokens: list[int]
    statistics: Statistics

    def __str__(self) -> str:
        return self.text


def load_model(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> TextModel:
    """Load a trained model from a run folder (its newest checkpoint), a checkpoint folder or an exported folder.

    Args:
        path: the folder.
        device: where the model is to lie.
        dtype: type of its weights; None means as stored.

    Raises:
        CheckpointError: There is nothing to load, or it is damaged.
        DataError: The tokenizer that the recipe names is not there.
    """
    recipe, model = loading.load_model(path, device=device, dtype=dtype)
    return TextModel(recipe, pack_linear_maps(model), recipe_tokenizer(recipe), Path(path))


@overload
def generate(
    model: TextModel | MtpLightningModule | str | Path, prompt: str, *, stop: Sequence[str] = (), **options: Any
) -> GeneratedText: ...


@overload
def generate(
    model: TextModel | MtpLightningModule | str | Path,
    prompt: Sequence[str],
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> list[GeneratedText]: ...


def generate(
    model: TextModel | MtpLightningModule | str | Path,
    prompt: str | Sequence[str],
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> GeneratedText | list[GeneratedText]:
    """Continue a prompt, or several in one batch; the heads draft, and the text is the main head's own.

    Args:
        model: a loaded model, a module after `fit`, or a folder that `load_model` takes.
        prompt: one text, or several.
        stop: texts that end a continuation, which is cut behind them; the model's own end ids always do.
        options: fields of `mtp_lightning.decode.Settings`, e.g. max_new_tokens, temperature, decoder, draft_length.

    Raises:
        DecodingError: A prompt or an option does not fit the model.
        CheckpointError: There is no model to load.
    """
    source = _text_model(model)
    tokenizer = source.tokenizer

    given = [prompt] if isinstance(prompt, str) else prompt
    if not (isinstance(given, Sequence) and all(isinstance(text, str) for text in given)):
        kinds = {type(text).__name__: None for text in given} if isinstance(given, list | tuple) else {}
        found = " of ".join([f"a {type(given).__name__}", *([", ".join(kinds)] if kinds else [])])
        hint = "Give a str, or a list of them; ids of tokens go to mtp_lightning.decode.generate(model.model, ids, ...)"
        raise DecodingError("a prompt must be a text, or several", found, hint)
    prompts = [_encoded(tokenizer, text) for text in given]
    stops = [text.encode() for text in stop]
    ends = all_end_ids(source.recipe, tokenizer.end_of_document, source.folder)
    settings = Settings(stop_tokens=ends, stop_strings=stops, detokenize=detokenizer(tokenizer), **options)
    done = generate_tokens(source.model, prompts, settings)
    texts = []
    for before, tokens in zip(prompts, done.tokens, strict=True):
        text = text_stream(tokenizer, before, stop_strings=stops, left_out=ends)
        written = text.push(tokens) + text.end()
        texts.append(GeneratedText(written.decode(errors="replace"), tokens, done.statistics))
    return texts[0] if isinstance(prompt, str) else texts


def _encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return [*tokenizer.opening, *map(int, tokenizer.encode(prompt.encode()))]
    except UnicodeEncodeError:
        raise DecodingError(
            "a prompt must be text that UTF-8 can write", repr(prompt[:60]), "Leave lone surrogates out of it"
        ) from None


def save_model(module: MtpLightningModule, folder: str | Path) -> None:
    """Write the model of a module after `fit` as an exported folder, which `load_model` and every `mtp` command take.

    Under DDP call it on one rank, e.g. `if trainer.is_global_zero`.

    Raises:
        CheckpointError: The folder is not new or empty, or cannot be written; or there is no model yet.
    """
    weights, out = _Weights(dict(_model_of(module).named_parameters())), Path(folder)
    check_target(out)
    dtype = next(module.model.parameters()).dtype
    size_bytes = sum(parameter.nbytes for parameter in weights.parameters.values())
    with atomic_folder(out, CheckpointError, size_bytes=size_bytes) as staging:
        text = recipe_to_yaml(module.recipe).encode()
        files = {
            WHOLE_MODEL: write_whole(weights, staging / WHOLE_MODEL, dtype, lambda _: None),
            RECIPE_NAME: write_durably(staging / RECIPE_NAME, text),
        }
        copy_files(files_of_model(module.recipe), staging)
        step = module.loaded_step if module._trainer is None else module.trainer.global_step
        provenance = Provenance(step, tokens_after(module.recipe, step), hashlib.sha256(text).hexdigest())
        write_config(staging, module.recipe, provenance, files, dtype=name_of(dtype))


@final
@dataclass(frozen=True)
class _Weights:
    """Parameters in memory, in the form that exports read."""

    parameters: Mapping[str, Tensor]

    @property
    def names(self) -> Iterable[str]:
        return self.parameters

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.parameters[name].shape)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        flat = self.parameters[name].detach().flatten()
        for start in range(0, len(flat), BLOCK_ENTRIES):
            yield start, flat[start : start + BLOCK_ENTRIES].cpu()


def _text_model(model: TextModel | MtpLightningModule | str | Path) -> TextModel:
    if isinstance(model, TextModel):
        return model
    if isinstance(model, MtpLightningModule):
        return TextModel(model.recipe, _model_of(model), recipe_tokenizer(model.recipe))
    return load_model(model)


def _model_of(module: MtpLightningModule) -> MtpModel:
    if not hasattr(module, "model"):
        raise CheckpointError(
            "a module must have its model, which is built when a Trainer begins",
            "a module before Trainer.fit",
            "Fit it, or take MtpLightningModule.load_from_checkpoint(PATH); for a saved model load_model(FOLDER)",
        )
    return module.model
