"""A pretrained model of others as an exported folder that training can start from, with heads on it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import ValidationError

from mtp_lightning.checkpoint.convert.consolidate import REPORT_NAME, check_target, check_whole, name_of, write_whole
from mtp_lightning.checkpoint.format.carried_files import (
    GENERATION_CONFIG,
    SOURCE_CONFIG,
    TOKENIZERS,
    Files,
    copy_files,
    end_ids,
    files_in,
    license_of,
)
from mtp_lightning.checkpoint.format.manifest import CONFIG_NAME, RECIPE_NAME, Provenance, write_config
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL, ShardReader
from mtp_lightning.checkpoint.huggingface.adapter import SETTINGS as ADAPTER_SETTINGS
from mtp_lightning.checkpoint.huggingface.adapter import is_adapter, open_adapter
from mtp_lightning.checkpoint.huggingface.fitted_heads import FITTED_KINDS, CannotFitError, fitted_heads
from mtp_lightning.checkpoint.huggingface.folder import CONFIG, HFCheckpoint, open_folder
from mtp_lightning.checkpoint.huggingface.gguf_model import is_gguf, open_gguf
from mtp_lightning.checkpoint.huggingface.tensor_plan import Init, Plan, plan_import
from mtp_lightning.checkpoint.huggingface.vocabulary import with_rows
from mtp_lightning.checkpoint.huggingface.weight_files import find_snapshot
from mtp_lightning.checkpoint.huggingface.weights import IncomingWeights
from mtp_lightning.console.progress import say, watched
from mtp_lightning.data.tokenizers.files import CONVERT
from mtp_lightning.data.tokenizers.open import open_tokenizer, other_files
from mtp_lightning.errors import CheckpointError, DataError, RecipeError, visible
from mtp_lightning.files.atomic_folder import atomic_folder
from mtp_lightning.files.durable import write_durably
from mtp_lightning.files.untrusted import described
from mtp_lightning.recipe import Recipe, check_rules, recipe_to_yaml


def find_tokenizer(folder: Path) -> Path | None:
    """Find the tokenizer of a folder."""
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)


def end_of_document(path: Path, vocab_size: int, given: int | None) -> int:
    """Open a tokenizer and return the id that ends a document.

    Raises:
        CheckpointError: It has ids for which the embedding has no row.
        DataError: It cannot be read, or the end is in doubt.
    """
    tokenizer = open_tokenizer(str(path), end_of_document=given)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            "the embedding must have a row for every id of the tokenizer",
            f"{tokenizer.vocab_size:,} ids in {path} and {vocab_size:,} rows",
            "Take tokenizer and weights from the same model; or give rows to tokens that were added later: "
            "--resize-vocabulary auto",
        )
    return tokenizer.end_of_document


def carried_from(folder: Path, tokenizer_folder: Path | None = None) -> dict[str, Path]:
    """Find the files of somebody else's model that are carried along, under the names they have here.

    Args:
        folder: the model's.
        tokenizer_folder: an adapter's, where that has a tokenizer of its own.

    Raises:
        CheckpointError: One that says how texts end cannot be read.
    """
    files = files_in(tokenizer_folder or folder)
    for name, own in ((SOURCE_CONFIG, CONFIG), (GENERATION_CONFIG, GENERATION_CONFIG)):
        files.pop(name, None)
        if (folder / own).is_file():
            files[name] = folder / own
    end_ids(files, GENERATION_CONFIG)
    return files


COPYING_KINDS = ("parallel", "chained", "sequential", "recursive")
MOST_OFFSETS = 1024
PEAK_LR = 1e-5
"""What a pretrained trunk is usually trained on with, when all of it is."""
HEADER = """\
# {what}, imported from {path}, with n = {num_offsets} ({kind} heads, {init}).
# A run starts from the weights in this folder, which know this file by its digest: change fields on the command line
# (mtp train {recipe} optimizer.lr=1e-4), or in a recipe of your own that says `extends: {recipe}`.
"""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to become of a folder; None leaves the choice to what it holds.

    Attributes:
        num_offsets: number n of predicted tokens; None means those that the folder has heads for.
        kind: head kind.
        hidden: state that sequential and recursive modules read.
        init: what heads beyond the main one start as: the folder's own (`native`), `fitted` to a little text, copies of
            the last layer (`copy`), or `random`.
        allow: patterns of stored tensors that may be missing (their parameters start anew) or left out.
        end_of_document: id of the token that ends a document.
        base: folder of the model that an adapter belongs to; None means the one that it names.
        variant: which of several sets of weights, as in `model.VARIANT.safetensors`.
        fit_on: texts, or one folder of shards, that heads are fitted to; Python's standard library if empty.
        vocabulary: rows that the embedding is to have; `auto` means one for every id of the tokenizer, rounded up.
        family: `transformers` takes that library's own classes even where there is a trunk here.
    """

    num_offsets: int | None = None
    kind: str | None = None
    hidden: Literal["post_norm", "pre_norm"] | None = None
    init: Init | None = None
    allow: tuple[str, ...] = ()
    end_of_document: int | None = None
    base: Path | None = None
    variant: str | None = None
    vocabulary: int | Literal["auto"] | None = None
    fit_on: tuple[str, ...] = ()
    family: Literal["transformers"] | None = None


def import_folder(path: Path, out: Path, wanted: Wanted) -> None:
    """Write a pretrained model with heads on it into a new folder, and check it there value by value.

    Weights keep their type and their bits; of several types they take fp32, which holds them all. Memory beside the
    libraries' own: the largest stored tensor, twice, where a family stores several parameters in one; else 4 MiB
    blocks. The folder's recipe is ready to be trained.

    Args:
        path: folder as transformers (or Meta) writes it, a LoRA adapter as PEFT does, or a GGUF file of llama.cpp.
        out: folder to write; new or empty. It appears by one rename when it is complete.
        wanted: the heads, and what the folder may lack.

    Raises:
        CheckpointError: the folder is not one that can be imported, a tensor is missing, left over, or of another
            shape, the tokenizer does not fit, or `out` cannot be written.
        RecipeError: the heads do not fit the model.
    """
    check_target(out)
    with TemporaryDirectory(prefix="mtp_import_") as made:
        _import(path, out, wanted, Path(made))


def _import(path: Path, out: Path, wanted: Wanted, made: Path) -> None:
    hf_checkpoint = _opened(path, wanted, made)
    carried = carried_from(hf_checkpoint.made_files or hf_checkpoint.path, hf_checkpoint.tokenizer_folder)
    init = _init_of(hf_checkpoint, wanted)
    recipe = _recipe_of(hf_checkpoint, wanted, init, out)
    weights = IncomingWeights(hf_checkpoint, plan_import(hf_checkpoint, recipe, init, wanted.allow), recipe)
    tokenizer = find_tokenizer(hf_checkpoint.tokenizer_folder or hf_checkpoint.path)
    notes = list(hf_checkpoint.notes)
    if (native := hf_checkpoint.native) and init != "native" and native.apart:
        notes.append(f"The folder's own modules ({native.name}: {native.count}) are left out")
    if init == "fitted":
        try:
            weights = fitted_heads(weights, tokenizer, wanted.fit_on)
        except (CannotFitError, DataError) as error:
            if wanted.init or wanted.fit_on:
                raise
            init, reason = _unfitted(recipe.heads.kind), f"{error.expected}; found: {error.found}"
            notes.append(f"The heads are not fitted, for {reason}. {error.hint}")
    size_bytes = _write(weights, out, carried, header=_header(hf_checkpoint, recipe, init, out))
    say(visible(f"Imported {hf_checkpoint.what} from {path} to {out}: {size_bytes / 1e6:,.1f} MB, checked"))
    for line in (*weights.plan.report(), *notes):
        say(visible(line))
    if recipe.data.tokenizer == Recipe().data.tokenizer:
        say(visible(_no_tokenizer(path)))
    say(f"Train it: mtp train {out / RECIPE_NAME}")


def _no_tokenizer(path: Path) -> str:
    if names := other_files(path):
        return f"{path} has {', '.join(names)}, and no tokenizer.json. {CONVERT.format(path)}; then import again"
    return f"No tokenizer in {path}: give data.tokenizer, or shards whose ids are this model's"


def _opened(path: Path, wanted: Wanted, made: Path) -> HFCheckpoint:
    """Open a folder, a file of llama.cpp or an adapter, with as many rows for tokens as are wanted."""
    path = find_snapshot(path, (CONFIG_NAME, ADAPTER_SETTINGS))
    if is_gguf(path):
        hf_checkpoint: HFCheckpoint = _opened_gguf(path, wanted, made)
    elif is_adapter(path):
        hf_checkpoint = open_adapter(path, base=wanted.base, variant=wanted.variant, family=wanted.family)
    elif wanted.base is not None:
        raise CheckpointError(
            "--base belongs to an adapter, a folder with adapter_config.json", f"none in {path}", "Leave --base out"
        )
    else:
        hf_checkpoint = open_folder(path, variant=wanted.variant, family=wanted.family)
    if wanted.vocabulary is None:
        return hf_checkpoint
    found = find_tokenizer(hf_checkpoint.tokenizer_folder or hf_checkpoint.path)
    given = hf_checkpoint.end_of_document if wanted.end_of_document is None else wanted.end_of_document
    num_ids = open_tokenizer(str(found), end_of_document=given).vocab_size if found else 0
    return with_rows(hf_checkpoint, wanted.vocabulary, num_ids)


def _opened_gguf(path: Path, wanted: Wanted, made: Path) -> HFCheckpoint:
    for name, value in (("--base", wanted.base), ("--variant", wanted.variant), ("--family", wanted.family)):
        if value is not None:
            raise CheckpointError(f"{name} must belong to a folder", f"the file {path}", f"Leave {name} out")
    return open_gguf(path, made)


def _write(weights: IncomingWeights, out: Path, carried: Files, *, header: str) -> int:
    """Write the folder; return the bytes of its weights."""
    hf_checkpoint = weights.hf_checkpoint
    size_bytes = sum(math.prod(weights.shape(name)) for name in weights.names) * weights.dtype.itemsize
    with (
        watched(f"Importing {visible(hf_checkpoint.path.name)}", total_bytes=2 * size_bytes, show=True) as advance,
        atomic_folder(out, CheckpointError, size_bytes=size_bytes) as partial,
    ):
        record = write_whole(weights, partial / WHOLE_MODEL, weights.dtype, advance)
        check_whole(weights, ShardReader(partial), advance)
        copy_files(carried, partial)
        write_durably(partial / REPORT_NAME, _report_of(hf_checkpoint, weights.plan))
        text = header + recipe_to_yaml(weights.recipe)
        files = {WHOLE_MODEL: record, RECIPE_NAME: write_durably(partial / RECIPE_NAME, text.encode())}
        provenance = Provenance.of_file(carried.get(SOURCE_CONFIG, hf_checkpoint.settings_path))
        write_config(partial, weights.recipe, provenance, files, dtype=name_of(weights.dtype))
    return record.size_bytes


def _init_of(hf_checkpoint: HFCheckpoint, wanted: Wanted) -> Init:
    """Choose what heads start as, and check that it can be done."""
    kind = wanted.kind or "parallel"
    best = "fitted" if kind in FITTED_KINDS and (wanted.num_offsets or 1) > 1 else _unfitted(kind)
    native = hf_checkpoint.native
    is_meant = wanted.num_offsets != 1 and wanted.kind in (None, "sequential", "recursive")
    is_native = native is not None and (is_meant or not native.apart)
    init = wanted.init or ("native" if is_native else best)
    if init == "native" and hf_checkpoint.native is None:
        found = f"neither modules nor extra heads in {hf_checkpoint.path}"
        raise CheckpointError("--init native needs a folder with heads", found, "Choose --init copy or --init random")
    if init == "copy" and kind not in COPYING_KINDS:
        raise CheckpointError(
            f"--init copy needs heads made of layers: {', '.join(COPYING_KINDS)}",
            f"--kind {kind}",
            "Choose --init random: these heads start as the identity",
        )
    if init == "fitted" and kind not in FITTED_KINDS:
        expected = f"--init fitted needs heads that begin with a linear map: {', '.join(FITTED_KINDS)}"
        raise CheckpointError(expected, f"--kind {kind}", f"Choose --init {_unfitted(kind)}")
    if wanted.fit_on and init != "fitted":
        raise CheckpointError("--fit-on belongs to --init fitted", f"--init {init}", "Leave --fit-on out")
    return init


def _unfitted(kind: str) -> Init:
    return "copy" if kind in COPYING_KINDS else "random"


def _recipe_of(hf_checkpoint: HFCheckpoint, wanted: Wanted, init: Init, out: Path) -> Recipe:
    """Build the recipe that trains the heads.

    Raises:
        CheckpointError: the folder's heads are of another kind, or its tokenizer does not fit.
        RecipeError: the heads do not fit the model.
    """
    default, native = Recipe(), hf_checkpoint.native
    count, implied = (native.count, native.heads) if native and init == "native" else (0, {})
    kind = wanted.kind or implied.get("kind", "parallel")
    if kind != implied.get("kind", kind) and (kind, implied["kind"]) != ("recursive", "sequential"):
        raise CheckpointError(
            f"--init native must keep the kind of the folder's heads, {implied['kind']}",
            f"--kind {kind}",
            "Leave --kind out, or choose another --init",
        )
    if wanted.hidden and (
        kind not in ("sequential", "recursive") or implied.get("hidden", wanted.hidden) != wanted.hidden
    ):
        raise CheckpointError(
            "--hidden needs new modules that read it: --kind sequential or recursive, and not --init native",
            f"--hidden {wanted.hidden} with --kind {kind}, --init {init}",
            "Leave --hidden out, or choose such modules",
        )
    num_offsets = wanted.num_offsets or 1 + count
    if num_offsets > MOST_OFFSETS:
        expected = f"the model must predict at most {MOST_OFFSETS:,} tokens"
        raise CheckpointError(expected, f"{num_offsets:,}", "Give a smaller number with --offsets")
    heads = {"layers_from_trunk": False, **implied, "kind": kind, "num_offsets": num_offsets}
    heads |= {"hidden": wanted.hidden} if wanted.hidden else {}
    window = min(default.data.seq_len, hf_checkpoint.section.max_position_embeddings)
    values = {
        "name": out.absolute().name,
        "model": hf_checkpoint.section.model_dump(exclude_defaults=hf_checkpoint.section.is_foreign),
        "heads": heads,
        "data": {**_tokenizer_fields(hf_checkpoint, wanted, out), "seq_len": window},
        "optimizer": {"lr": PEAK_LR},
        "run": {"dir": f"runs/{out.absolute().name}"},
        "init": {"path": str(out.absolute())},
    }
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {described(first['input'])} ({first['msg']})"
        expected, hint = "the folder's settings must make a model that can be trained", "Choose another model"
        raise CheckpointError(expected, f"{found}, from {hf_checkpoint.settings_path}", hint) from None
    if faults := check_rules(recipe):
        raise RecipeError(faults)
    return recipe


def _tokenizer_fields(hf_checkpoint: HFCheckpoint, wanted: Wanted, out: Path) -> dict[str, Any]:
    found = find_tokenizer(hf_checkpoint.tokenizer_folder or hf_checkpoint.path)
    if found is None:
        return {}
    given = hf_checkpoint.end_of_document if wanted.end_of_document is None else wanted.end_of_document
    end = end_of_document(found, hf_checkpoint.section.vocab_size, given)
    fields = {"tokenizer": str(out.absolute() / found.name), "end_of_document": end}
    return {**fields, "add_special_tokens": True} if _frames_texts(found, end) else fields


def _frames_texts(tokenizer: Path, end_of_document: int) -> bool:
    """Say whether the model has seen texts with special tokens around them, as a begin of sequence."""
    try:
        opened = open_tokenizer(str(tokenizer), end_of_document=end_of_document, add_special_tokens=True)
    except DataError:  # SentencePiece alone, or a frame that is not around a text
        return False
    return bool(opened.opening or opened.closing)


def _report_of(hf_checkpoint: HFCheckpoint, plan: Plan) -> bytes:
    """Write down for every parameter what it started as."""
    parameters: Mapping[str, Mapping[str, str | None]] = {
        name: {"how": how, "from": source.stored if source else None} for name, (how, source) in plan.origins.items()
    }
    report = {
        "source": str(hf_checkpoint.path.absolute()),
        "what": hf_checkpoint.what,
        "license": license_of(hf_checkpoint.path),
        "parameters": parameters,
        "missing": plan.missing,
        "unexpected": plan.unexpected,
        "notes": hf_checkpoint.notes,
    }
    return json.dumps(report, indent=1).encode() + b"\n"


def _header(hf_checkpoint: HFCheckpoint, recipe: Recipe, init: Init, out: Path) -> str:
    heads = recipe.heads
    return HEADER.format(
        what=hf_checkpoint.what,
        path=visible(str(hf_checkpoint.path.absolute()), kept=""),  # a line break would end the comment
        num_offsets=heads.num_offsets,
        kind=heads.kind,
        init=init,
        recipe=visible(str(out.absolute() / RECIPE_NAME), kept=""),
    )
