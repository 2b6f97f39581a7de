"""Find a tokenizer by name, folder or file, and the chat template that goes with it."""

import dataclasses
from pathlib import Path

from mtp_lightning.data.tokenizers.base import ByteTokenizer, Tokenizer
from mtp_lightning.data.tokenizers.beside import NAME
from mtp_lightning.data.tokenizers.chat import CONFIG, PLAIN, ChatTemplate, named_tokens, read_object
from mtp_lightning.data.tokenizers.files import CONVERT, FILE_TOKENIZERS, no_special_tokens
from mtp_lightning.errors import DataError
from mtp_lightning.files.paths import expanded, leads_to
from mtp_lightning.files.untrusted import shown

TOKENIZERS: dict[str, type[Tokenizer]] = {"byte": ByteTokenizer}

OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model", "spiece.model")


def open_tokenizer(
    spec: str,
    *,
    end_of_document: int | None = None,
    parse_special_tokens: bool = False,
    add_special_tokens: bool = False,
) -> Tokenizer:
    """Return the tokenizer of a name, of a folder as transformers saves it, or of a file.

    A folder must have a `tokenizer.json`; the files beside it (`tokenizer_config.json`, `special_tokens_map.json`,
    `added_tokens.json`) add what transformers takes from them, also where the `tokenizer.json` itself is named. A file
    of another name is read alone: `*.json` (Hugging Face) or `*.model` (SentencePiece). The end-of-document id is the
    tokenizer's own unless given.

    Args:
        spec: name, folder or file.
        end_of_document: id that ends a document.
        parse_special_tokens: whether special tokens that a text spells out become their ids.
        add_special_tokens: whether documents get what the post-processor adds (begin and end of sequence).

    Raises:
        DataError: There is none, its file or its library cannot be loaded, it has no end-of-document id, or has no
            special tokens to parse or add.
    """
    if spec in TOKENIZERS:
        if parse_special_tokens or add_special_tokens:
            raise no_special_tokens(
                f"the tokenizer {spec}", hint="Leave parse_special_tokens and add_special_tokens out"
            )
        return _with_own_end(TOKENIZERS[spec](), end_of_document)
    path = Path(expanded(spec))
    if leads_to(path, Path.is_dir):
        path = _file_of(path)
    if path.suffix not in FILE_TOKENIZERS:
        names, suffixes = ", ".join(TOKENIZERS), " or ".join(f"*{suffix}" for suffix in FILE_TOKENIZERS)
        hint = f"Choose one of: {names}, a folder with a {NAME}, a file {suffixes}"
        raise DataError("data.tokenizer must name a tokenizer", repr(spec), hint)
    return FILE_TOKENIZERS[path.suffix](
        path,
        end_of_document=end_of_document,
        parse_special_tokens=parse_special_tokens,
        add_special_tokens=add_special_tokens,
    )


def open_chat_template(tokenizer: str, chosen: str | None = None) -> ChatTemplate | None:
    """Return the chat template that goes with a tokenizer; None where there is none.

    Args:
        tokenizer: as in `open_tokenizer`. Bytes have the plain layout; a file other than `tokenizer.json` has none.
        chosen: `plain`, the name of one of several templates, or a file; the tokenizer's own unless given.

    Raises:
        DataError: The one that is chosen does not exist, or a file is damaged.
    """
    if chosen == "plain" or (chosen is None and tokenizer in TOKENIZERS):
        return PLAIN
    path = Path(expanded(tokenizer))
    folder = path if leads_to(path, Path.is_dir) else path.parent if path.name == NAME else None
    own = ChatTemplate.from_folder(folder) if folder else None
    if chosen is None:
        return own
    if own and chosen in own.templates:
        return dataclasses.replace(own, templates={"default": own.templates[chosen]})
    file = Path(expanded(chosen))
    if not leads_to(file, Path.is_file):
        names = ", ".join(("plain", *map(shown, own.templates if own else ())))
        raise DataError(
            "data.chat_template must be a file, or a name", repr(chosen), f"Correct the path, or choose one of: {names}"
        )
    return ChatTemplate.from_file(file, named_tokens(folder, read_object(folder / CONFIG)) if folder else {})


def _file_of(folder: Path) -> Path:
    if (folder / NAME).is_file():
        return folder / NAME
    found = ", ".join(other_files(folder)) or "none of the usual files"
    raise DataError(f"a folder of a tokenizer must have a {NAME}", f"{found} in {folder}", CONVERT.format(folder))


def other_files(folder: Path) -> list[str]:
    """List the files of a folder that transformers would make a `tokenizer.json` from."""
    return [name for name in OTHER_FILES if (folder / name).exists()]


def _with_own_end(tokenizer: Tokenizer, end_of_document: int | None) -> Tokenizer:
    if end_of_document in (None, tokenizer.end_of_document):
        return tokenizer
    raise DataError(
        f"data.end_of_document of the tokenizer {tokenizer.name} must be {tokenizer.end_of_document}",
        str(end_of_document),
        "Leave data.end_of_document out",
    )
