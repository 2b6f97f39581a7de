"""Text printed as it comes is the text of all tokens decoded at once, and stop strings are found in that text."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mtp_lightning.data.tokenizers.base import ByteTokenizer
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.decode.text_stream import WINDOW, text_stream
from tests.data.text_tokenizers import END, SENTENCES, write_sentencepiece

TEXTS = (
    "it is four STOP here",
    "地图 😀 naïve café",
    "  two  spaces, a\ttab\n\nand lines  ",
    "do n't , he 's ' quoted ' . The quick fox!",
    "👩‍👩‍👧 zero-width, e\u0301 combining, \ufffd itself",
    "The quick fox number 7 said: naïve café, 259! " * 8,
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bpe(**options):
    return Tokenizer(models.BPE(unk_token="<unk>", **options))


def trained(tokenizer, trainer, specials=("<unk>", END), **options):
    tokenizer.train_from_iterator(
        [*SENTENCES, *TEXTS], trainer(special_tokens=[*specials], show_progress=False, **options)
    )
    return tokenizer


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(
        tokenizer, trainers.BpeTrainer, (END,), vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )


def metaspace():
    tokenizer = bpe()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, trainers.BpeTrainer, vocab_size=400)


def byte_fallback():
    """As Llama 2's: spaces by a normalizer, bytes where a character is not known, one space stripped in front."""
    tokenizer = bpe(byte_fallback=True, fuse_unk=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(special_tokens=["<unk>", END, *BYTES], vocab_size=420, show_progress=False)
    )
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer, vocab_size=300, unk_token="<unk>")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return trained(tokenizer, trainers.WordPieceTrainer, vocab_size=400)


def word_ends():
    tokenizer = bpe(end_of_word_suffix="</w>")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    return trained(tokenizer, trainers.BpeTrainer, vocab_size=400, end_of_word_suffix="</w>")


FAMILIES = (byte_level, metaspace, byte_fallback, unigram, word_piece, word_ends, write_sentencepiece, ByteTokenizer)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def tokenizer(request, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    if request.param is ByteTokenizer:
        return ByteTokenizer()
    if request.param is write_sentencepiece:
        return open_tokenizer(str(write_sentencepiece(folder / "tokenizer.model", add_dummy_prefix=True)))
    request.param().save(str(folder / "tokenizer.json"))
    return open_tokenizer(str(folder / "tokenizer.json"))


def decoded(tokenizer, tokens):
    return tokenizer.decode(np.asarray(tokens, dtype=np.int64))


def pieces_of(tokens, source):
    """Cut tokens at random, as accepted drafts do."""
    while tokens:
        length = source.randint(1, 4)
        yield tokens[:length]
        tokens = tokens[length:]


def cases_of(tokenizer):
    """Prompts and what follows: real texts cut anywhere, then any tokens whatever."""
    source = random.Random(3)
    for text in TEXTS:
        tokens = tokenizer.encode(text.encode()).tolist()
        for cut in {1, len(tokens) // 2, len(tokens) - 1}:
            yield tokens[:cut], tokens[cut:]
    for _ in range(12):
        tokens = [source.randrange(tokenizer.vocab_size) for _ in range(source.choice((5, 3 * WINDOW)))]
        yield tokenizer.encode(b"The fox ").tolist(), tokens


def test_text_as_it_comes_is_the_whole_text(tokenizer):
    source = random.Random(1)
    num_streamed = 0
    for prompt, tokens in cases_of(tokenizer):
        stream = text_stream(tokenizer, prompt)
        parts = [stream.push(piece) for piece in pieces_of(tokens, source)]
        before, whole = decoded(tokenizer, prompt), decoded(tokenizer, [*prompt, *tokens])
        while not whole.startswith(before):  # the prompt ends amid a character
            before = before.removesuffix("\ufffd".encode())
        assert before + b"".join(parts) + stream.end() == whole
        num_streamed += sum(map(bool, parts))
    assert num_streamed > 100


def test_a_text_stops_where_a_string_is_complete(tokenizer):
    num_stopped = 0
    for prompt, tokens in cases_of(tokenizer):
        before, whole = decoded(tokenizer, prompt), decoded(tokenizer, [*prompt, *tokens])
        text = whole[len(before) :].decode(errors="ignore")
        if not whole.startswith(before) or len(text) < 4:
            continue
        said_by = [decoded(tokenizer, [*prompt, *tokens[:count]])[len(before) :] for count in range(len(tokens) + 1)]
        for start in range(0, len(text) - 2, 5):
            strings = [text[start : start + 3].encode(), text[start + 1 : start + 3].encode()]
            stream, kept, parts = text_stream(tokenizer, prompt, stop_strings=strings), 0, []
            while kept < len(tokens) and not stream.has_stopped:
                parts.append(stream.push(tokens[kept : kept + 1]))
                kept += 1
            by_hand = [count for count, said in enumerate(said_by) if count and any(one in said for one in strings)]
            assert stream.has_stopped == bool(by_hand)
            if by_hand:
                said = said_by[by_hand[0]]
                ends = [said.find(one) + len(one) for one in strings if one in said]
                assert (kept, b"".join(parts)) == (by_hand[0], said[: min(ends)])
                num_stopped += 1
    assert num_stopped > 20


def test_tokens_that_end_a_text_are_not_written(tokenizer):
    prompt, tokens = tokenizer.encode(b"The fox").tolist(), tokenizer.encode(b" said").tolist()
    stream = text_stream(tokenizer, prompt, left_out=[tokens[-1]])
    said = stream.push([*tokens[:-1], tokens[-1]]) + stream.end()
    assert said == decoded(tokenizer, [*prompt, *tokens[:-1]])[len(decoded(tokenizer, prompt)) :]
