"""Small tokenizers of both kinds of file, trained on the spot."""

import io
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SENTENCES = [
    f"The {adjective} {animal} number {number} said: naïve café, {number * 37}!"
    for number in range(40)
    for adjective, animal in [("quick", "fox"), ("lazy", "dog"), ("small", "mouse")]
]


def write_tokenizer_json(path: Path, *, specials: tuple[str, ...] = (END, "<|user|>"), size: int = 400) -> Path:
    """Train a byte-level BPE; the special tokens come first."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(path))
    return path


def write_sentencepiece(path: Path, **options: Any) -> Path:
    """Train a unigram model with byte fallback, which knows every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        **{
            "vocab_size": 340,
            "byte_fallback": True,
            "minloglevel": 2,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            **options,
        },
    )
    path.write_bytes(model.getvalue())
    return path
