"""Tokenizers in files of llama.cpp: the ids of the tokenizers that they were made of."""

import json

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mtp_lightning.checkpoint.huggingface.gguf_model import open_gguf
from mtp_lightning.checkpoint.huggingface.gguf_tokenizer import PATTERNS
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from tests.data.text_tokenizers import SENTENCES, write_sentencepiece

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
pytest.importorskip("gguf", reason="needs gguf: pip install 'mtp_lightning[gguf]'")
from tests.checkpoint.gguf_models import model_of, save_gguf  # noqa: E402

TEXTS = [
    *SENTENCES[:3],
    "It's 1234567 o'clock,\n\n  don't    you'LL   THEY'VE\tknow? ",
    "def f(x):\n    return x + 12345  # naïve café\r\n\r\n\tif  1 == 2: pass  ",
    "  日本語 ½ ² Ⅷ 🎉🎉 ...!!!\n\n\n  CamelCaseWords HTTPServer2 a/b//c\n",
    "",
    " ",
]
CORPUS = [*SENTENCES, *TEXTS] * 3
TEMPLATE = "{% for message in messages %}<s>{{ message.content }}{% endfor %}"
END, USER = "<|end|>", "<|user|>"


def trained():
    """A byte-level BPE whose merges run over every kind of boundary, so that its ids tell where texts are cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[END, USER], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


SOURCE = trained()


def written(folder, keys, num_ids):
    """Write a file with a tokenizer, and return what is made of it."""
    model = model_of(transformers, "llama", vocab_size=num_ids)
    save_gguf(model, "llama", folder / "a.gguf", keys=keys)
    (folder / "made").mkdir()
    return Tokenizer.from_file(str(open_gguf(folder / "a.gguf", folder / "made").made_files / "tokenizer.json"))


def byte_level(pre):
    told = json.loads(SOURCE.to_str())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in told["merges"]],
        "tokenizer.ggml.token_type": [3, 4] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def splits(pre):
    """How transformers, or for two the tokenizers library, cuts a text."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    split = pre_tokenizers.Split(Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "tekken"])
def test_byte_level(pre, tmp_path):
    made = written(tmp_path, byte_level(pre), SOURCE.get_vocab_size())
    judge = Tokenizer.from_str(SOURCE.to_str())
    judge.pre_tokenizer = splits(pre)
    if pre in ("llama-bpe", "tekken"):
        told = json.loads(judge.to_str())
        told["model"]["ignore_merges"] = True
        judge = Tokenizer.from_str(json.dumps(told))
    judge.add_special_tokens([END])
    judge.add_tokens([USER])
    for text in (*TEXTS, f"Hi{USER} there{END}\n12"):
        assert made.encode(text).ids == judge.encode(text).ids, text
        assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text
    assert (tmp_path / "made/chat_template.jinja").read_text() == TEMPLATE


def test_every_pattern_has_been_judged():
    judged = [PATTERNS[pre] for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "tekken")]
    assert all(pattern in judged for pattern in PATTERNS.values())


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece(has_prefix, tmp_path):
    options = {"model_type": "bpe", "vocab_size": 500, "add_dummy_prefix": has_prefix, "character_coverage": 1.0}
    path = write_sentencepiece(tmp_path / "tokenizer.model", **options)
    judge = sentencepiece.SentencePieceProcessor(model_file=str(path))
    num_ids = judge.get_piece_size()
    path.unlink()
    kinds = [
        2 if judge.is_unknown(i) else 3 if judge.is_control(i) else 6 if judge.is_byte(i) else 1 for i in range(num_ids)
    ]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [judge.id_to_piece(i) for i in range(num_ids)],
        "tokenizer.ggml.scores": [judge.get_score(i) for i in range(num_ids)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": judge.bos_id(),
        "tokenizer.ggml.eos_token_id": judge.eos_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": has_prefix,
    }
    made = written(tmp_path, keys, num_ids)
    for text in TEXTS:
        ids = judge.encode(text)
        assert made.encode(text, add_special_tokens=False).ids == ids, text
        assert made.encode(text).ids == [judge.bos_id(), *ids]
        assert made.decode(ids) == text


def test_a_tokenizer_beside_the_file_is_taken(tmp_path):
    judge = Tokenizer.from_str(SOURCE.to_str())
    judge.pre_tokenizer = splits("smollm")
    judge.save(str(tmp_path / "tokenizer.json"))
    made = written(tmp_path, byte_level("unheard-of"), SOURCE.get_vocab_size())
    assert made.to_str() == judge.to_str()
    other = Tokenizer(models.BPE({"b": 0, "a": 1}, []))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="must be that of its model"):
        open_gguf(tmp_path / "a.gguf", tmp_path / "made")


def test_an_import_has_tokenizer_template_and_fitted_heads(tmp_path, capsys):
    model = model_of(transformers, "llama", vocab_size=SOURCE.get_vocab_size())
    save_gguf(model, "llama", tmp_path / "a.gguf", "Q8_0", keys=byte_level("qwen2"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 20))
    import_folder(tmp_path / "a.gguf", tmp_path / "ours", Wanted(num_offsets=2, kind="sequential", fit_on=(str(text),)))
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in (tmp_path / "ours").iterdir()}
    origins = json.loads((tmp_path / "ours/import.json").read_text())["parameters"].values()
    assert "fitted" in {origin["how"] for origin in origins}
    assert "dequantised" in capsys.readouterr().out
