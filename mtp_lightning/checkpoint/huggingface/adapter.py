"""A LoRA adapter as PEFT saves it, seen as the model that it makes of its base: every update added to its weight."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.checkpoint.format.tensors import Entry, read_tensor
from mtp_lightning.checkpoint.huggingface.configs import Config, listed, named, possible_settings
from mtp_lightning.checkpoint.huggingface.families import FAMILIES
from mtp_lightning.checkpoint.huggingface.folder import (
    HFCheckpoint,
    Update,
    changed,
    open_folder,
    read_entries,
    tied_as_stored,
)
from mtp_lightning.checkpoint.huggingface.tensor_plan import DTYPES
from mtp_lightning.checkpoint.huggingface.weight_files import in_pickles, read_json
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import described
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.schema.model import Family

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.default)?(\.weight)?")
WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""
KNOWN = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
        "peft_version",
    ),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out", "bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),  # of no effect alone
}
"""Settings that are read here, or change nothing in what the adapter computes."""
MERGE = (
    "Merge it with PEFT where it was made, PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(OUT), "
    "and import OUT"
)
MOST_RANK = 2**20
_LOOSE = re.compile(r"\)[*+{?]")
MOST_REPEATS = 3
MOST_CHOICES = 8


class _Pair(NamedTuple):
    """Where the two factors of an update lie in the adapter's file."""

    down: Entry
    up: Entry
    is_embedding: bool


def is_adapter(path: Path) -> bool:
    """Tell whether a folder is an adapter; transformers opens a folder that is both as an adapter."""
    try:
        return (path / SETTINGS).is_file()
    except OSError:
        return False  # what is wrong is told when the folder is read


def open_adapter(
    path: Path, *, base: Path | None = None, variant: str | None = None, family: Family | None = None
) -> HFCheckpoint:
    """Open an adapter and its base as one model.

    Args:
        path: folder of the adapter.
        base: folder of the model that it belongs to; None means the one that the adapter names.
        variant: which of several sets of weights of the base.
        family: how the base is opened; see `open_folder`.

    Raises:
        CheckpointError: it is not LoRA, uses a variant of it that is not known here, or does not fit its base; or the
            base cannot be opened.
    """
    config = Config(path / SETTINGS, read_json(path / SETTINGS))
    _check_kind(config)
    hf_checkpoint = open_folder(_base_folder(config, base), variant=variant, family=family)
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise in_pickles(path, ["adapter_model.bin"], WEIGHTS)
        raise CheckpointError(f"an adapter must hold {WEIGHTS}", f"none in {path}", "Download the folder again")
    entries, _ = read_entries([path / WEIGHTS])
    pairs, replaced = _sort(hf_checkpoint, entries, path)
    hf_checkpoint = _with_tensors(hf_checkpoint, path / WEIGHTS, replaced)
    with possible_settings(config):
        updates = {name: _update(hf_checkpoint, config, name, pair, path) for name, pair in pairs.items()}
    touched = [name for name in hf_checkpoint.vocabulary if name in updates]
    if touched and hf_checkpoint.section.tie_word_embeddings:
        raise CheckpointError(
            "an update must not belong to a matrix that is the embedding and the unembedding",
            f"one of {', '.join(touched)}, in {path}",
            "Merged, it would change both, unmerged one: set tie_word_embeddings to false in a copy of the base that "
            "stores both",
        )
    note = f"Merged the adapter {path}: {len(updates)} matrices updated, {len(replaced)} tensors replaced"
    return replace(hf_checkpoint, updates=updates, notes=(*hf_checkpoint.notes, note))


def _check_kind(config: Config) -> None:
    """Refuse other adapters than LoRA, and variants of it that compute something else."""
    kind = config.get("peft_type", "nothing")
    if kind != "LORA":
        raise config.refused("an adapter must be LoRA (peft_type LORA)", named(kind), MERGE)
    odd = [name for name, value in config.values.items() if name not in KNOWN and value]
    if (start := config.get("init_lora_weights", default=True)) not in PLAIN_STARTS:
        odd.append(f"init_lora_weights {named(start)}, which changes the base")
    if odd:
        raise config.refused("an adapter must be plain LoRA, without variants", listed(odd), MERGE)


def _base_folder(config: Config, given: Path | None) -> Path:
    if given is not None:
        return given
    told = config.get("base_model_name_or_path")
    if isinstance(told, str) and told and "\0" not in told and len(told) < 1024 and Path(told).is_dir():
        return Path(told)
    raise config.refused(
        "the base of an adapter must be a folder here",
        f"base_model_name_or_path {described(told)}",
        "Download that model, and give its folder with --base",
    )


def _sort(
    hf_checkpoint: HFCheckpoint, entries: Mapping[str, Entry], path: Path
) -> tuple[dict[str, _Pair], dict[str, Entry]]:
    """Divide an adapter's tensors into pairs of factors and whole tensors, by the stored name that each belongs to."""
    family = hf_checkpoint.section.family
    complete = FAMILIES[family].stored_name if family in FAMILIES else str
    factors: dict[str, dict[str, Entry]] = {}
    replaced: dict[str, Entry] = {}
    embeddings, odd = set(), []
    allowed = {*hf_checkpoint.entries, *hf_checkpoint.vocabulary}
    for name, entry in entries.items():
        inner = WRAPPER.sub("", name.removeprefix(PREFIX))
        match = FACTOR.fullmatch(inner)
        target = complete(f"{match[1]}.weight" if match else inner)
        if not name.startswith(PREFIX) or target not in allowed:
            odd.append(name)
        elif match:
            factors.setdefault(target, {})[match[3]] = entry
            embeddings |= {target} if match[2] else set()
        else:
            replaced[target] = entry
    odd += [f"{name} with one of two factors" for name, pair in factors.items() if len(pair) < 2]
    if odd or not entries:
        raise CheckpointError(
            "every tensor of an adapter must belong to one of its base",
            f"{listed(odd)} of {len(entries)}, in {path / WEIGHTS}, for {hf_checkpoint.path}",
            "Give the model that the adapter was trained on with --base",
        )
    pairs = {name: _Pair(pair["A"], pair["B"], name in embeddings) for name, pair in factors.items()}
    return pairs, replaced


def _with_tensors(hf_checkpoint: HFCheckpoint, file: Path, replaced: Mapping[str, Entry]) -> HFCheckpoint:
    """Take whole tensors from an adapter: modules that were trained with it, biases, and a longer vocabulary."""
    embedding, matrix = hf_checkpoint.vocabulary
    entries, files = dict(hf_checkpoint.entries), dict(hf_checkpoint.files)
    if hf_checkpoint.section.tie_word_embeddings and {embedding, matrix} & {*replaced}:
        entries.setdefault(matrix, entries[embedding])
        files.setdefault(matrix, files[embedding])
    entries |= replaced
    files |= dict.fromkeys(replaced, file)
    section = hf_checkpoint.section
    if embedding in replaced and replaced[embedding].shape:
        section = changed(section, vocab_size=replaced[embedding].shape[0])
    has_tokenizer = any((file.parent / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    adapted = replace(
        hf_checkpoint,
        entries=entries,
        files=files,
        section=section,
        tokenizer_folder=file.parent if has_tokenizer else None,
    )
    return tied_as_stored(adapted)


def _update(hf_checkpoint: HFCheckpoint, config: Config, name: str, pair: _Pair, path: Path) -> Update:
    """Check an update against its matrix, and give it its scale."""
    shape, file = hf_checkpoint.entries[name].shape, path / WEIGHTS
    module = name.removesuffix(".weight")
    rank = _of_module(config, "rank_pattern", module, config.get("r", default=8))
    alpha = config.number("lora_alpha", _of_module(config, "alpha_pattern", module, config.get("lora_alpha", 8)))
    is_turned = pair.is_embedding or _is_turned(hf_checkpoint, module)
    wanted = ((rank, shape[0]), (shape[-1], rank)) if is_turned else ((rank, shape[-1]), (shape[0], rank))
    found = (pair.down.shape, pair.up.shape)
    if type(rank) is not int or not 0 < rank <= MOST_RANK or found != wanted:
        raise CheckpointError(
            f"the factors of an update must be of rank {described(rank)}, and fit the matrix of the base",
            f"{[*map(list, found)]} for {name} {list(shape)}, in {file}",
            "Give the model that the adapter was trained on with --base",
        )
    if not {pair.down.dtype, pair.up.dtype} <= {*DTYPES}:
        expected, found_types = "an adapter must be plain fp32, bf16 or fp16 numbers", f"{pair.down.dtype} for {name}"
        raise CheckpointError(expected, f"{found_types}, in {file}", MERGE)

    def factors() -> tuple[Tensor, Tensor]:
        down, up = read_tensor(file, pair.down), read_tensor(file, pair.up)
        num_odd = sum(one.numel() - int(torch.isfinite(one).sum()) for one in (down, up))
        if num_odd:
            found = f"{num_odd:,} NaN or infinite in the update of {name}, in {file}"
            raise CheckpointError("every weight must be a finite number", found, "Take another checkpoint of it")
        return (up.T, down.T) if is_turned else (down, up)

    return Update(factors, alpha / (math.sqrt(rank) if config.get("use_rslora", default=False) else rank))


def _is_turned(hf_checkpoint: HFCheckpoint, module: str) -> bool:
    """Tell whether a matrix is stored as (channels in, channels out), as GPT-2's are."""
    if not hf_checkpoint.section.is_foreign:
        return False
    kind = architecture_of(hf_checkpoint.section).model.get_submodule(module)
    return type(kind).__name__ == "Conv1D"


def _of_module(config: Config, name: str, module: str, default: Any) -> Any:
    """Return what a table of patterns says of a module, as PEFT looks it up: the first that the name ends with."""
    table = config.get(name, default={})
    if not isinstance(table, dict):
        raise config.impossible(f"{name}: {described(table)} (an object is meant)")
    _check_patterns(config, name, table)
    matching = (key for key in table if re.match(rf"(.*\.)?({key})$", module))
    return table.get(next(matching, module), default)


def _check_patterns(config: Config, name: str, patterns: Iterable[str]) -> None:
    """Refuse patterns that are none, or could be searched for without end."""
    for pattern in patterns:
        try:
            re.compile(pattern)
            is_slow = (
                len(pattern) > 1000
                or _LOOSE.search(pattern)
                or len(re.findall(r"[*+{]", pattern)) > MOST_REPEATS
                or len(re.findall(r"(?<!\()[?|]", pattern)) > MOST_CHOICES
            )
        except (re.error, RecursionError, OverflowError):
            is_slow = True
        if is_slow:
            expected = f"{name} must name modules, or be short patterns with few repeats and choices"
            raise config.refused(expected, described(pattern), MERGE)
