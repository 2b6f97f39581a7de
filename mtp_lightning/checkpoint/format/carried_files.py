"""Files of other programs that go with a model, byte for byte: its tokenizer, chat template and generation settings.

They lie beside the weights in every folder that import, extend and export write, and are found from a run by its
tokenizer, or by the folder that it started from.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import sync
from mtp_lightning.files.paths import expanded
from mtp_lightning.files.untrusted import OddFileError, described, read_bounded, read_object, reason_of
from mtp_lightning.recipe import Recipe

SOURCE_CONFIG: Final = "hf_config.json"
"""The config.json that an imported model came with, under another name: ours is called so, too."""
GENERATION_CONFIG: Final = "generation_config.json"
TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files that can be opened as a tokenizer, the first that is there."""
TEMPLATES: Final = "additional_chat_templates"
OF_TOKENIZER: Final = (
    *TOKENIZERS,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model.*"),
    *("vocab.*", "merges.txt", "encoder.json", "spm*.model", "sentencepiece.model", "*.spm", "*.tiktoken"),
    *("tekken.json", "chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja"),
)
CARRIED: Final = (*OF_TOKENIZER, GENERATION_CONFIG, SOURCE_CONFIG)
MOST_CARD_BYTES: Final = 2**20
_LICENSE: Final = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9.+_-]{0,60})[\"']?[ \t]*\r?$", re.MULTILINE)
Files = Mapping[str, Path]
"""Where each file lies, by its name in the folder of a model."""


def files_in(folder: Path, patterns: tuple[str, ...] = CARRIED) -> dict[str, Path]:
    """Find the files of some patterns in a folder."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def files_of_model(recipe: Recipe, path: Path | None = None) -> dict[str, Path]:
    """Find the files that go with a trained model.

    Args:
        recipe: the recipe that it was trained by.
        path: folder that its weights were read from, if there is one.
    """
    tokenizer = _tokenizer_of(recipe)
    folders = [path, tokenizer and tokenizer.parent, recipe.init.path and Path(expanded(recipe.init.path))]
    origin = next((folder for folder in folders if folder and (folder / SOURCE_CONFIG).is_file()), None)
    if origin is not None and (tokenizer is None or _has_tokenizer(origin, tokenizer)):
        return files_in(origin)
    if tokenizer is None or not tokenizer.is_file():
        return {}
    if tokenizer.name in TOKENIZERS:
        return files_in(tokenizer.parent, OF_TOKENIZER)
    return {TOKENIZERS[0] if tokenizer.suffix == ".json" else TOKENIZERS[1]: tokenizer}  # the name that others look for


def with_own_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    """Let a recipe whose tokenizer has gone from its place name the one that lies beside the weights."""
    named = _tokenizer_of(recipe)
    if named is None or named.exists() or not (own := folder / named.name).is_file():
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": str(own)})})


def _tokenizer_of(recipe: Recipe) -> Path | None:
    """Return the file that a recipe's tokenizer is read from, which may be named by its folder; None for bytes."""
    if recipe.data.tokenizer == "byte":
        return None
    path = Path(expanded(recipe.data.tokenizer))
    return path if path.suffix in (".json", ".model") else path / TOKENIZERS[0]


def _has_tokenizer(folder: Path, tokenizer: Path) -> bool:
    """Tell whether a folder holds the tokenizer of a recipe, which may itself be gone."""
    own = folder / tokenizer.name
    return own.is_file() and (not tokenizer.is_file() or own.read_bytes() == tokenizer.read_bytes())


def copy_files(files: Files, folder: Path) -> None:
    """Copy files into the folder of a model, and force them to disk."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        sync(target)
    for parent in {(folder / name).parent for name in files} - {folder}:
        sync(parent)


def read_settings(files: Files, name: str) -> dict[str, Any]:
    """Read one of the files that hold a JSON object; {} where it is not there.

    Raises:
        CheckpointError: It is something else.
    """
    if name not in files:
        return {}
    try:
        return read_object(files[name])
    except (OSError, OddFileError) as error:
        raise CheckpointError(
            f"{name} must be a JSON object", f"{reason_of(error)}, in {files[name]}", "Download the file again"
        ) from None


def license_of(folder: Path) -> str | None:
    """Read the licence that the card of a model's folder names in its front matter, or its settings; None without."""
    found = None
    try:
        text = read_bounded(folder / "README.md", MOST_CARD_BYTES).decode(errors="replace")
        found = _LICENSE.search(text.split("\n---", 1)[0]) if text.startswith("---") else None
    except (OSError, OddFileError):
        pass
    if found:
        return found[1]
    try:
        told = read_object(folder / "config.json").get("license")
    except (OSError, OddFileError):
        return None
    return told if isinstance(told, str) and _LICENSE.fullmatch(f"license: {told}") else None


def end_ids(files: Files, name: str) -> list[int]:
    """List the ids that end a text, by one of the settings.

    Raises:
        CheckpointError: The settings cannot be read, or say something else than ids.
    """
    told = read_settings(files, name).get("eos_token_id")
    ends = told if isinstance(told, list) else [] if told is None else [told]
    for end in ends:
        if type(end) is not int:
            raise CheckpointError(
                "eos_token_id must be an id, or a list of ids",
                f"{described(end)}, in {files[name]}",
                "Correct it, or download the file again",
            )
    return ends


def all_end_ids(recipe: Recipe, end_of_document: int, path: Path | None = None) -> list[int]:
    """List all ids that end a text of a trained model: the tokenizer's end of document first, then the model's own.

    Raises:
        CheckpointError: As `end_ids`.
    """
    files = files_of_model(recipe, path)
    own = [*end_ids(files, SOURCE_CONFIG), *end_ids(files, GENERATION_CONFIG)]
    return [*dict.fromkeys([end_of_document, *own])]
