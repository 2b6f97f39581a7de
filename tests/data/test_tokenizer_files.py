"""Tokenizers from files give what their own libraries give, and never the end of a document."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.data.tokenizers.base import Tokenizer
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.errors import DataError
from tests.data.text_tokenizers import END, SENTENCES, write_sentencepiece, write_tokenizer_json

MAKERS: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json": write_tokenizer_json,
    "pieces.model": write_sentencepiece,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("tokenizers") / request.param)


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    return open_tokenizer(str(file))


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\u2581")))  # SentencePiece's space
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text.encode())
    assert tokenizer.end_of_document not in tokens
    assert tokens.max(initial=0) < tokenizer.vocab_size
    assert tokenizer.decode(np.append(tokens, tokenizer.end_of_document)) == text.encode()


def test_ids_are_those_of_the_library(file: Path, tokenizer: Tokenizer) -> None:
    if file.suffix == ".json":
        inner: Any = tokenizers.Tokenizer.from_file(str(file))
        expected = [inner.encode(text, add_special_tokens=False).ids for text in SENTENCES]
    else:
        expected = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(SENTENCES)
    texts = [text.encode() for text in SENTENCES]
    assert [tokens.tolist() for tokens in tokenizer.encode_many(texts)] == expected
    assert [tokenizer.encode(text).tolist() for text in texts] == expected
    assert len({len(ids) for ids in expected}) > 1


def test_offsets_tell_the_characters_of_each_token(tokenizer: Tokenizer) -> None:
    text = "naïve 😀 fox\n  x"
    ((tokens, offsets),) = tokenizer.encode_with_offsets([text.encode()], parse_special_tokens=False)
    assert tokens.tolist() == tokenizer.encode(text.encode()).tolist()
    assert {place for begin, end in offsets.tolist() for place in range(begin, end)} == set(range(len(text)))
    assert (np.diff(offsets[:, 0]) >= 0).all()


def test_special_tokens_of_a_sentencepiece_model_are_refused_by_name(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "x.model")
    for options in ({"parse_special_tokens": True}, {"add_special_tokens": True}):
        with pytest.raises(DataError, match=r"need a tokenizer.json; found .*x.model. Write a tokenizer.json once"):
            open_tokenizer(str(path), **options)


def test_name_size_and_hash_are_those_of_the_file(file: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.name == file.name
    assert tokenizer.vocab_size == (400 if file.suffix == ".json" else 340)
    assert tokenizer.fingerprint() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_special_tokens_in_a_text_are_text(file: Path, tokenizer: Tokenizer) -> None:
    for word in (END, "</s>", "<|user|>"):
        text = f"a {word} b".encode()
        assert tokenizer.encode(text).size > 5
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_token_can_be_shown(tokenizer: Tokenizer) -> None:
    shown = [tokenizer.printable(token) for token in range(tokenizer.vocab_size)]
    assert all(text.isprintable() and " " not in text and text for text in shown)
    assert shown[tokenizer.end_of_document] == "<end>"
    assert len(set(shown)) > 330


def test_truncation_and_padding_of_the_file_are_not_followed(tmp_path: Path) -> None:
    path = write_tokenizer_json(tmp_path / "tokenizer.json")
    whole = open_tokenizer(str(path)).encode(SENTENCES[0].encode()).tolist()
    inner: Any = tokenizers.Tokenizer.from_file(str(path))
    inner.enable_truncation(4)
    inner.enable_padding(length=200)
    inner.save(str(path))
    assert len(inner.encode(SENTENCES[0]).ids) == 200
    assert open_tokenizer(str(path)).encode(SENTENCES[0].encode()).tolist() == whole


def test_text_that_is_not_utf8_is_not_changed_silently(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode(b"caf\xe9")


@pytest.mark.parametrize("specials", [(), ("</s>", END)])
def test_end_of_document_in_doubt_must_be_given(tmp_path: Path, specials: tuple[str, ...]) -> None:
    path = write_tokenizer_json(tmp_path / "tokenizer.json", specials=specials)
    with pytest.raises(
        DataError, match=r"one token of tokenizer.json must end a document; found .*Give its id"
    ) as caught:
        open_tokenizer(str(path))
    assert caught.value.found == ("<|endoftext|> = 1, </s> = 0" if specials else "none of the usual ones")
    assert open_tokenizer(str(path), end_of_document=1).end_of_document == 1
    with pytest.raises(DataError, match=r"must be below the 400 ids of tokenizer.json; found 400"):
        open_tokenizer(str(path), end_of_document=400)


def test_model_without_an_end_must_be_given_one(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "x.model", eos_id=-1)
    with pytest.raises(DataError, match="must end a document"):
        open_tokenizer(str(path))
    assert open_tokenizer(str(path), end_of_document=0).end_of_document == 0


def test_bytes_end_as_they_do() -> None:
    assert open_tokenizer("byte", end_of_document=256).end_of_document == 256
    with pytest.raises(DataError, match="tokenizer byte must be 256; found 3"):
        open_tokenizer("byte", end_of_document=3)


@pytest.mark.parametrize("name", ["x.json", "x.model"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\0 no tokenizer"])
def test_file_that_is_no_tokenizer_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}'? must be (readable|a)"):
        open_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize(("name", "library"), [("x.json", "tokenizers"), ("x.model", "sentencepiece")])
def test_missing_library_is_named_with_the_line_to_install_it(
    tmp_path: Path, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(DataError, match=rf"library {library} must be installed to read .*pip install 'mtp_lightning"):
        open_tokenizer(str(tmp_path / name))
