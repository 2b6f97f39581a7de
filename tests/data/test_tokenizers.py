import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.data.tokenizers.base import ByteTokenizer, token_dtype
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.errors import DataError


@given(st.binary())
def test_bytes_survive_the_round_trip(text: bytes) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == list(text)
    assert tokenizer.decode(np.append(tokens, tokenizer.end_of_document)) == text


def test_printable_tokens_are_distinct_visible_and_short() -> None:
    shown = [ByteTokenizer().printable(token) for token in range(257)]
    assert len(set(shown)) == 257
    assert all(text.isprintable() and " " not in text and 1 <= len(text) <= 5 for text in shown)
    assert (shown[10], shown[32], shown[92], shown[97], shown[256]) == ("\\n", "␣", "\\", "a", "<end>")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_unknown_tokenizer_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(DataError, match=r"found 'bite'. Choose one of: byte"):
        open_tokenizer("bite")
