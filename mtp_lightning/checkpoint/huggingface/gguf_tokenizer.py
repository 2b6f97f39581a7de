"""The tokenizer that a GGUF file describes, written as a folder of transformers would hold it.

Byte-level BPE and SentencePiece's BPE, as llama.cpp runs them: texts are cut before merging by the patterns that the
file names (`tokenizer.ggml.pre`), without which ids differ from those that the model has been trained with.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.checkpoint.format.carried_files import OF_TOKENIZER, TEMPLATES, TOKENIZERS, copy_files, files_in
from mtp_lightning.checkpoint.huggingface.configs import listed
from mtp_lightning.checkpoint.huggingface.gguf_file import GGUFHeader
from mtp_lightning.data.text.extras import import_extra
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import described, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of tokens in the format."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}DIGITS| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _WORDS.replace("DIGITS", "{1,3}"), _WORDS.replace("DIGITS", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*ENDING"
    r"|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASES.replace("ENDING", "").replace("DIGITS", "")
_GPT4O = _CASES.replace("ENDING", f"{_SHORT}?").replace("DIGITS", "{1,3}")
_BEGINNING = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken")
"""Whose texts begin with a begin of sequence unless the file says otherwise, and whose words may be tokens unmerged."""
PATTERNS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys((*_BEGINNING[:-1], "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"), (_QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
}
"""Patterns that cut a text, one after the other, by the name of a pre-tokenizer."""
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
OF_SENTENCEPIECE = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids that llama.cpp takes where a file does not say them."""
BESIDE = "Put the tokenizer.json of the model's release beside the file: it is taken in place of the file's own"
_HARMLESS = re.compile(r"[A-Za-z0-9_-]{1,64}")


def write_tokenizer(header: GGUFHeader, num_rows: int, folder: Path) -> list[str]:
    """Write a file's tokenizer and chat templates into a folder, or the tokenizer that lies beside the file.

    Args:
        header: the model's, or that of its first file.
        num_rows: rows of the embedding.
        folder: where to write; left empty where the file has no tokenizer.

    Returns:
        what is to be said of it.

    Raises:
        CheckpointError: it is damaged, of a kind that is not known here, or does not fit the model.
    """
    values = _Values(header)
    kind, tokens = header.values.get("tokenizer.ggml.model"), header.values.get("tokenizer.ggml.tokens")
    if kind in (None, "none", "no_vocab") or tokens is None:
        return []
    if not isinstance(tokens, list) or not 0 < len(tokens) <= num_rows:
        found = f"{len(tokens):,} tokens" if isinstance(tokens, list) else described(tokens)
        raise values.refused(f"the tokens must be a list with at most one for each of {num_rows:,} rows", found)
    beside = header.path.parent / TOKENIZERS[0]
    named = {name: tokens[one] for name, one in values.ids(tokens).items()}
    settings: dict[str, Any] = {name: named[key] for name, key in NAMED.items() if key in named}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    notes = _write_templates(header, folder)
    if beside.is_file():
        _check_same(values, beside, tokens)
        copy_files(files_in(beside.parent, OF_TOKENIZER), folder)
        return [*notes, f"The tokenizer is {beside}, which lies beside the file"]
    if kind == "gpt2":
        tokenizer = _byte_level(values, tokens, notes)
    elif kind == "llama":
        tokenizer = _sentencepiece(values, tokens)
    else:
        raise values.refused("the tokenizer of a *.gguf file must be of the model gpt2 or llama", described(kind))
    if len(set(tokens)) < len(tokens):
        notes.append(f"{len(tokens) - len(set(tokens)):,} tokens have the text of another, which is encoded instead")
    tokenizer.save(str(folder / TOKENIZERS[0]))
    return notes


class _Values:
    """The values of a file that are the tokenizer's."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.is_sentencepiece = header.values.get("tokenizer.ggml.model") == "llama"

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value."""
        return self.header.values.get(f"tokenizer.ggml.{name}", default)

    def row(self, name: str, length: int) -> list[Any] | None:
        """Return a list with a number for each token."""
        told = self.get(name)
        if told is None:
            return None
        if isinstance(told, list) or len(told) != length:
            found = f"{len(told):,} entries or none of them numbers"
            raise self.refused(f"tokenizer.ggml.{name} must be a number for each of {length:,} tokens", found)
        numbers: list[Any] = told.tolist()
        return numbers

    def ids(self, tokens: Sequence[str]) -> dict[str, int]:
        """Return the ids of special tokens by their names in the format."""
        found = {}
        for name in ("bos", "eos", "unknown", "padding", "eot", "eom"):
            told = self.get(f"{name}_token_id", OF_SENTENCEPIECE.get(name) if self.is_sentencepiece else None)
            if told is None:
                continue
            if type(told) is not int or not 0 <= told < len(tokens):
                raise self.refused(
                    f"tokenizer.ggml.{name}_token_id must be one of {len(tokens):,} ids", described(told)
                )
            found[name] = told
        return found

    def refused(self, expected: str, found: str, hint: str = BESIDE) -> CheckpointError:
        """Build the error about the tokenizer."""
        return CheckpointError(expected, f"{found}, in {self.header.path}", hint)


def _byte_level(values: _Values, tokens: Sequence[str], notes: list[str]) -> Any:
    """Build a byte-level BPE, whose merges the file lists."""
    library = import_extra("tokenizers", f"read the tokenizer of {values.header.path.name}")
    pre = values.get("pre")
    if pre is None or pre == "default":
        notes.append(
            "The file does not name its pre-tokenizer (tokenizer.ggml.pre), as old ones do not: texts are cut as by "
            f"GPT-2's. If the model had another, ids differ. {BESIDE}"
        )
        pre = "gpt-2"
    if not isinstance(pre, str) or pre not in PATTERNS:
        raise values.refused("the pre-tokenizer of a *.gguf file must be one that is known here", described(pre))
    merges = values.get("merges", [])
    pairs = [(one[:gap], one[gap + 1 :]) for one in merges if isinstance(one, str) and (gap := one.find(" ", 1)) > 0]
    if len(pairs) < len(merges):
        raise values.refused("tokenizer.ggml.merges must be pairs of tokens", f"{len(merges) - len(pairs):,} others")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    cutting = library.pre_tokenizers
    tokenizer = _built(values, vocabulary, pairs, ignore_merges=pre in _BEGINNING)
    tokenizer.pre_tokenizer = cutting.Sequence(
        [
            *(cutting.Split(library.Regex(pattern), behavior="isolated") for pattern in PATTERNS[pre]),
            cutting.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    return _with_special(values, tokenizer, tokens, begins=pre in _BEGINNING)


def _sentencepiece(values: _Values, tokens: Sequence[str]) -> Any:
    """Build SentencePiece's BPE, whose merges follow from the scores of its pieces."""
    library = import_extra("tokenizers", f"read the tokenizer of {values.header.path.name}")
    scores, types = values.row("scores", len(tokens)), values.row("token_type", len(tokens))
    if scores is None:
        raise values.refused("a SentencePiece tokenizer must have tokenizer.ggml.scores", "none")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [
        (scores[number], len(left), len(right), -vocabulary[left], left, right)
        for number, token in enumerate(tokens)
        if types is None or types[number] in (NORMAL, USER_DEFINED)
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in vocabulary and right in vocabulary
    ]
    pairs.sort(key=lambda pair: pair[:4], reverse=True)
    unknown = values.ids(tokens).get("unknown")
    tokenizer = _built(
        values,
        vocabulary,
        [pair[4:] for pair in pairs],
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )
    has_prefix = values.get("add_space_prefix", True)
    spaces = [library.normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = library.normalizers.Sequence([*spaces, library.normalizers.Replace(" ", "▁")])
    steps = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    steps += [library.decoders.Strip(content=" ", left=1)] if has_prefix else []
    tokenizer.decoder = library.decoders.Sequence(steps)
    return _with_special(values, tokenizer, tokens, begins=True)


def _built(values: _Values, vocabulary: Mapping[str, int], pairs: Sequence[Any], **how: Any) -> Any:
    library = import_extra("tokenizers", f"read the tokenizer of {values.header.path.name}")
    try:
        return library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=pairs, **how))
    except Exception as error:  # the library raises plain Exception
        raise values.refused("merges must be of tokens that the file has", shown(error)) from error


def _with_special(values: _Values, tokenizer: Any, tokens: Sequence[str], *, begins: bool) -> Any:
    """Mark the tokens that are found whole in a text, and say which stand around it."""
    library = import_extra("tokenizers", f"read the tokenizer of {values.header.path.name}")
    types, ids = values.row("token_type", len(tokens)) or [NORMAL] * len(tokens), values.ids(tokens)
    special = {number for number, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)} | {*ids.values()}
    whole = sorted(special | {number for number, kind in enumerate(types) if kind == USER_DEFINED})
    tokenizer.add_tokens(
        [
            library.AddedToken(tokens[number], normalized=False, special=number in special)
            for number in whole
            if tokens[number]
        ]
    )
    frame = {"bos": values.get("add_bos_token", begins), "eos": values.get("add_eos_token", False)}
    missing = [name for name, is_added in frame.items() if is_added is True and name not in ids]
    if missing and values.get(f"add_{missing[0]}_token") is not None:
        raise values.refused(f"a file with add_{missing[0]}_token must say its id", "none")
    opening, closing = ([tokens[ids[name]]] if frame[name] is True and name in ids else [] for name in ("bos", "eos"))
    if opening or closing:
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[*opening, "$A", *closing],
            pair=[*opening, "$A", *closing, *(f"{one}:1" for one in opening), "$B:1", *(f"{one}:1" for one in closing)],
            special_tokens=[(tokens[ids[name]], ids[name]) for name in ("bos", "eos") if name in ids],
        )
    return tokenizer


def _check_same(values: _Values, path: Path, tokens: Sequence[str]) -> None:
    """Check that a tokenizer gives the tokens of a file the same ids."""
    library = import_extra("tokenizers", f"read {path}")
    hint = "Move it elsewhere, or put that of the model's release there"
    try:
        ids: dict[str, int] = library.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            "a tokenizer.json beside a *.gguf file must be one", f"{shown(error)}: {path}", hint
        ) from None
    odd = [described(token) for number, token in enumerate(tokens) if ids.get(token, number) != number]
    if odd or len(ids) > len(tokens):
        raise values.refused(
            f"a tokenizer.json beside a *.gguf file must be that of its model ({path})",
            f"other ids for {len(odd):,} tokens ({listed(odd)}), and {len(ids):,} ids for {len(tokens):,}",
            hint,
        )


def _write_templates(header: GGUFHeader, folder: Path) -> list[str]:
    """Write the chat templates; return what is to be said of those that are left out."""
    start = "tokenizer.chat_template"
    told = {key: one for key, one in header.values.items() if key.startswith(start) and isinstance(one, str)}
    if (text := told.pop(start, None)) is not None:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8", newline="")
    left = []
    for key, text in told.items():
        name = key.removeprefix(f"{start}.")
        if _HARMLESS.fullmatch(name):
            (folder / TEMPLATES).mkdir(exist_ok=True)
            (folder / TEMPLATES / f"{name}.jinja").write_text(text, encoding="utf-8", newline="")
        else:
            left.append(described(name))
    return [f"Chat templates not read, for their names: {listed(left)}"] if left else []
