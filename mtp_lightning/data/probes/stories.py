"""Short stories whose characters have names of two tokens [Gloeckle et al. 2024, section 4.1].

A name is two syllables, a token each. In training names come from a fixed pool; in the test they are pairs that no
training story has. So whoever goes on with the second syllable of a name mentioned before has looked it up.
"""

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mtp_lightning.data.text.extras import import_extra

POOL_SIZE: Final = 1000
MOST_SENTENCES: Final = 12
END: Final = "<|endoftext|>"
UNKNOWN: Final = "[UNK]"
FIRST: Final = tuple(f"{consonant}{vowel}" for consonant in "BDGKLRTV" for vowel in "aeiou")
SECOND: Final = tuple(f"{consonant}{vowel}" for consonant in "fhjmnpsz" for vowel in "aeiou")

FILLED: Final[Mapping[str, tuple[str, ...]]] = {
    "place": ("garden", "forest", "kitchen", "barn", "river", "park", "hill", "village", "beach", "cave"),
    "thing": ("ball", "kite", "box", "drum", "lamp", "boat", "cake", "hat", "shell", "key", "book", "bell"),
    "look": ("red", "small", "old", "shiny", "round", "blue", "big", "soft", "green", "heavy"),
    "mood": ("happy", "sad", "tired", "proud", "afraid", "curious", "angry", "quiet"),
    "animal": ("cat", "dog", "bird", "frog", "fox", "mouse", "duck", "goat"),
    "deed": ("ran", "walked", "jumped", "danced", "hurried", "crept"),
}
BEGINNINGS: Final = (
    "Once there was a child called {a}. {a} lived near the {place} with a friend called {b}.",
    "One day {a} went to the {place}. There {a} met {b}, who had a {look} {thing}.",
    "{a} and {b} were playing at the {place}. {b} was {mood}, but {a} was {mood}.",
)
MIDDLES: Final = (
    "{a} found a {look} {thing}.",
    "{a} showed the {thing} to {b}.",
    "May {b} have the {thing}? It was {a} who asked.",
    "Come with me to the {place}, said {a} to {b}.",
    "{b} felt {mood} and {deed} to the {place}.",
    "Then {a} saw a {look} {animal}, and {b} saw it too.",
    "The {animal} took the {thing} of {a}.",
    "{a} {deed} after the {animal} until {b} was {mood}.",
    "Thank you, {a}, said {b}.",
    "So {a} gave {b} the {look} {thing}.",
    "The {thing} was {look}, and {a} liked it.",
    "{b} told {a} about a {look} {animal} at the {place}.",
)
ENDINGS: Final = (
    "At last {a} and {b} went home. {a} was {mood}.",
    "From that day on {a} and {b} shared the {thing}.",
    "{b} hugged {a}, and they were {mood} together.",
)


def stories(count: int, seed: int, *, is_test: bool) -> Iterator[dict[str, Any]]:
    """Yield stories as rows with `text`, and those of the test also with the `names` that are measured."""
    pool = _pool(random.Random(f"{seed} names"))
    known = set(pool)
    draw = random.Random(f"{seed} {'test' if is_test else 'train'}")
    for _ in range(count):
        names = draw.sample(pool, 2)
        if is_test:
            names = _new_names(draw, known)
        row = {"text": _story(draw, names)}
        yield {**row, "names": names} if is_test else row


def _pool(draw: random.Random) -> list[str]:
    """Draw the names of training; every syllable is in some, and a first one has several second ones."""
    names: list[str] = []
    while len(names) < POOL_SIZE:
        firsts, seconds = (draw.sample(part, len(part)) for part in (FIRST, SECOND))
        names += [name for first, second in zip(firsts, seconds, strict=False) if (name := first + second) not in names]
    return names[:POOL_SIZE]


def _new_names(draw: random.Random, known: set[str]) -> list[str]:
    """Draw two names that are not in the pool and share no syllable."""
    while True:
        firsts, seconds = draw.sample(FIRST, 2), draw.sample(SECOND, 2)
        names = [first + second for first, second in zip(firsts, seconds, strict=True)]
        if known.isdisjoint(names):
            return names


def _story(draw: random.Random, names: list[str]) -> str:
    """Write a story of two; who does what to whom changes from sentence to sentence, things and places less so."""
    words = {kind: draw.sample(words, 2) for kind, words in FILLED.items()}
    forms = [
        draw.choice(BEGINNINGS),
        *(draw.choice(MIDDLES) for _ in range(draw.randint(MOST_SENTENCES // 3, MOST_SENTENCES - 2))),
        draw.choice(ENDINGS),
    ]
    sentences = []
    for place, form in enumerate(forms):
        a, b = names if place == 0 else draw.sample(names, 2)
        filled = {kind: draw.choice(pair) for kind, pair in words.items()}
        sentences.append(form.format(a=a, b=b, **filled))
    return " ".join(sentences)


def tokenizer_json() -> bytes:
    """Return a tokenizer.json of the words of these stories: one token per word, two per name."""
    library = import_extra("tokenizers", "write the tokenizer of the stories")
    split = library.pre_tokenizers.Whitespace()
    texts = [*BEGINNINGS, *MIDDLES, *ENDINGS]
    plain = " ".join(text.format(a="", b="", **dict.fromkeys(FILLED, "")) for text in texts)
    plain += " " + " ".join(word for words in FILLED.values() for word in words)
    words = sorted({piece for piece, _ in split.pre_tokenize_str(plain)} - {",."})
    pieces = [END, UNKNOWN, *words, *FIRST, *(f"##{syllable}" for syllable in SECOND)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = library.decoders.WordPiece()
    tokenizer.add_special_tokens([END])
    return str(json.dumps(json.loads(tokenizer.to_str()), indent=1)).encode()
