"""Find a tokenizer by name or file."""

from pathlib import Path

from mtp_lightning.data.tokenizers.base import ByteTokenizer, Tokenizer
from mtp_lightning.data.tokenizers.files import FILE_TOKENIZERS, no_special_tokens
from mtp_lightning.errors import DataError
from mtp_lightning.files.paths import expanded

TOKENIZERS: dict[str, type[Tokenizer]] = {"byte": ByteTokenizer}


def open_tokenizer(spec: str, *, end_of_document: int | None = None, parse_special_tokens: bool = False) -> Tokenizer:
    """Return the tokenizer of a name, or that of a `tokenizer.json` (Hugging Face) or `*.model` (SentencePiece) file.

    The end-of-document id is the tokenizer's own unless given.

    Raises:
        DataError: There is none, its file or its library cannot be loaded, or it has no end-of-document id.
    """
    if spec in TOKENIZERS:
        if parse_special_tokens:
            raise no_special_tokens(f"the tokenizer {spec}")
        return _with_own_end(TOKENIZERS[spec](), end_of_document)
    path = Path(expanded(spec))
    if path.suffix not in FILE_TOKENIZERS:
        names, suffixes = ", ".join(TOKENIZERS), " or ".join(f"*{suffix}" for suffix in FILE_TOKENIZERS)
        raise DataError(
            "data.tokenizer must name a tokenizer", repr(spec), f"Choose one of: {names}, a file {suffixes}"
        )
    return FILE_TOKENIZERS[path.suffix](
        path, end_of_document=end_of_document, parse_special_tokens=parse_special_tokens
    )


def _with_own_end(tokenizer: Tokenizer, end_of_document: int | None) -> Tokenizer:
    if end_of_document in (None, tokenizer.end_of_document):
        return tokenizer
    raise DataError(
        f"data.end_of_document of the tokenizer {tokenizer.name} must be {tokenizer.end_of_document}",
        str(end_of_document),
        "Leave data.end_of_document out",
    )
