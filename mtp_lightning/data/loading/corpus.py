"""From a recipe to its shards: those it names, or those built from its corpus into the run's cache."""

import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path

from mtp_lightning.console.progress import say
from mtp_lightning.data.shards.build import BuildOptions, build_shards, listing_hash
from mtp_lightning.data.shards.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, describe, load_manifest
from mtp_lightning.data.shards.remote import mirror, mirror_folder
from mtp_lightning.data.text.records import Reading
from mtp_lightning.data.text.sources import find_files, is_stdlib
from mtp_lightning.data.tokenizers.base import Tokenizer
from mtp_lightning.data.tokenizers.chat import PLAIN
from mtp_lightning.data.tokenizers.open import open_chat_template, open_tokenizer
from mtp_lightning.errors import DataError
from mtp_lightning.files.paths import expanded, is_url
from mtp_lightning.recipe.schema.data import DataSection
from mtp_lightning.recipe.schema.root import Recipe


def shards_folder(recipe: Recipe) -> Path:
    """Return the folder of the recipe's shards, whether or not they have been built yet."""
    if recipe.data.shards is not None:
        return folder_of(recipe, recipe.data.shards)
    return Path(recipe.run.cache) / f"data-{_corpus_key(recipe.data)}"


def folder_of(recipe: Recipe, name: str) -> Path:
    """Return the folder of shards, or the one that has manifest and index of shards from a URL."""
    if is_url(name):
        return mirror_folder(name, Path(recipe.run.cache))
    return Path(expanded(name))


def prepare_named(recipe: Recipe, name: str) -> Path:
    """Say which shards are used, after fetching manifest and index of those from a URL; return their folder.

    Raises:
        DataError: They cannot be fetched or used.
    """
    folder = mirror(name, Path(recipe.run.cache)) if is_url(name) else folder_of(recipe, name)
    say(f"using shards {name if is_url(name) else folder}: {describe(load_manifest(folder))}", stderr=True)
    return folder


def prepare_shards(recipe: Recipe) -> Path:
    """Build the shards of the recipe's corpus unless they are there, say which, and return their folder.

    Raises:
        DataError: The corpus cannot be built, or what is there cannot be used.
    """
    if recipe.data.shards is not None:
        return prepare_named(recipe, recipe.data.shards)
    folder = shards_folder(recipe)
    if (folder / MANIFEST_NAME).exists():
        _say_if_corpus_changed(recipe.data, prepare_named(recipe, str(folder)), load_manifest(folder))
    else:
        say(f"building shards {folder} from {', '.join(recipe.data.corpus)}", stderr=True)
        _check_vocabulary(recipe)
        options = BuildOptions(
            tokenizer=recipe.data.tokenizer,
            end_of_document=recipe.data.end_of_document,
            parse_special_tokens=recipe.data.parse_special_tokens,
            add_special_tokens=recipe.data.add_special_tokens,
            chat_template=recipe.data.chat_template,
            validation_fraction=recipe.data.validation_fraction,
            deduplicate=recipe.data.deduplicate,
            reading=Reading.of(recipe.data),
        )
        build_shards(recipe.data.corpus, folder, options)
    return folder


def check_manifest(recipe: Recipe, manifest: Manifest, folder: Path) -> None:
    """Check that shards fit the tokenizer and the model of a recipe.

    Raises:
        DataError: They are of another tokenizer, or hold ids that the model lacks.
    """
    _check_tokenizer(recipe, manifest)
    _check_template(recipe, manifest, folder)
    check_largest_token(manifest.largest_token, recipe.model.vocab_size, f"the shards in {folder}")


def check_largest_token(largest_token: int, vocab_size: int, where: str) -> None:
    """Check that the model has a row of its embedding for the largest token id.

    Raises:
        DataError: It has not.
    """
    if largest_token >= vocab_size:
        raise DataError(
            f"every token id must be below model.vocab_size = {vocab_size:,}",
            f"id {largest_token:,} in {where}",
            f"Raise model.vocab_size to {largest_token + 1:,}, or choose another tokenizer or other shards",
        )


def _check_vocabulary(recipe: Recipe) -> None:
    """Refuse a model too small for its tokenizer before text is tokenized."""
    tokenizer = recipe_tokenizer(recipe)
    check_largest_token(tokenizer.vocab_size - 1, recipe.model.vocab_size, f"the tokenizer {tokenizer.name}")


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """Open the tokenizer that the recipe names.

    Raises:
        DataError: There is none, or its file or its library cannot be loaded.
    """
    return open_tokenizer(
        recipe.data.tokenizer,
        end_of_document=recipe.data.end_of_document,
        parse_special_tokens=recipe.data.parse_special_tokens,
        add_special_tokens=recipe.data.add_special_tokens,
    )


def _check_tokenizer(recipe: Recipe, manifest: Manifest) -> None:
    tokenizer = recipe_tokenizer(recipe)
    if not manifest.tokenizer_hash:  # adopted by the size of its vocabulary
        _check_size(tokenizer, manifest)
        return
    wanted = (tokenizer.fingerprint(), tokenizer.end_of_document)
    if wanted != (manifest.tokenizer_hash, manifest.end_of_document):
        named = manifest.tokenizer if manifest.tokenizer == "byte" else f"the file {manifest.tokenizer} of that hash"
        raise DataError(
            "data.tokenizer must be the tokenizer that the shards were made with, "
            f"{_spelled(manifest.tokenizer, manifest.tokenizer_hash, manifest.end_of_document)}",
            _spelled(tokenizer.name, *wanted),
            f"Set data.tokenizer to {named}, or build the shards again with `mtp data build`",
        )


def _check_size(tokenizer: Tokenizer, manifest: Manifest) -> None:
    """Check a tokenizer against shards that were adopted without one."""
    if tokenizer.end_of_document != manifest.end_of_document or tokenizer.vocab_size <= manifest.largest_token:
        raise DataError(
            f"data.tokenizer must have the end of document of the shards, {manifest.end_of_document:,}, and more than "
            f"{manifest.largest_token:,} ids",
            f"{tokenizer.name}: end of document {tokenizer.end_of_document:,}, {tokenizer.vocab_size:,} ids",
            "Set data.tokenizer to the tokenizer that they are of, and data.end_of_document if it ends documents "
            "otherwise",
        )


def _check_template(recipe: Recipe, manifest: Manifest, folder: Path) -> None:
    """Refuse chats of another template than the one that the recipe names and the model will be served with."""
    template = open_chat_template(recipe.data.tokenizer, recipe.data.chat_template)
    if template and manifest.chat_template and template.fingerprint() != manifest.chat_template:
        raise DataError(
            f"chats in {folder} must be rendered with the chat template of the recipe, "
            f"{template.where} {template.fingerprint()[:12]}",
            manifest.chat_template[:12],
            "Set data.chat_template to the one that they were built with, or build them again",
        )


def _spelled(name: str, fingerprint: str, end_of_document: int) -> str:
    return f"{name} {fingerprint[:12]} (end of document {end_of_document})"


def _corpus_key(data: DataSection) -> str:
    """Return a hash of all that decides the tokens but the text: a run goes on with the text it began with."""
    needs_python = any(map(is_stdlib, data.corpus))
    template = open_chat_template(data.tokenizer, data.chat_template)
    parts = {
        "corpus": [source if is_stdlib(source) else _absolute(source) for source in data.corpus],
        "tokenizer": open_tokenizer(data.tokenizer, end_of_document=data.end_of_document).fingerprint(),
        "validation_fraction": data.validation_fraction,
        "format_version": FORMAT_VERSION,
        "python": f"{platform.python_implementation()} {platform.python_version()}" if needs_python else None,
        **({"end_of_document": data.end_of_document} if data.end_of_document is not None else {}),
        **({"deduplicate": True} if data.deduplicate else {}),
        **({"parse_special_tokens": True} if data.parse_special_tokens else {}),
        **({"add_special_tokens": True} if data.add_special_tokens else {}),
        **({"chat_template": template.fingerprint()} if template and template is not PLAIN else {}),
        **{name: value for name, value in asdict(Reading.of(data)).items() if value not in (None, "refuse")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _say_if_corpus_changed(data: DataSection, folder: Path, manifest: Manifest) -> None:
    try:
        files = find_files(data.corpus)
    except DataError as error:
        say(f"the corpus of these shards cannot be found any more: {error.found}", stderr=True)
        return
    built_at = (folder / MANIFEST_NAME).stat().st_mtime
    newer = sum(file.path.stat().st_mtime > built_at for file in files)
    if newer or listing_hash(files) != manifest.source_listing:
        hint = f"to use it, remove {folder} and start a new run"
        say(f"its corpus has changed since ({newer:,} newer files); {hint}", stderr=True)


def _absolute(source: str) -> str:
    return str(Path(source).resolve())
