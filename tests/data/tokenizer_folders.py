"""Tokenizer folders of many kinds, as transformers saves them, each with a template of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.data.text_tokenizers import SENTENCES

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eot_id|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '<call>' + c | tojson }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content|trim + eos_token }}"
    "{% elif m.role != 'system' %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{%- if tools %}\n{{- '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}"
    "{{- '<|im_end|>\\n' }}{% endif %}{% set ns = namespace(n=0) %}" + CHATML
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<s>' + m.role + '\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n\n' }}{% endif %}"
)


def _trained(model: Any, trainer: Any, **parts: Any) -> Any:
    tokenizer: Any = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([*SENTENCES, "地图 Grüße\n\tdef f(x):  return x"], trainer)
    return tokenizer


def _bpe(**options: Any) -> Any:
    return trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, show_progress=False, **options)


def byte_level(*, prefix: bool = False) -> Any:
    return _trained(
        models.BPE(),
        _bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=True),
    )


def metaspace(scheme: str) -> Any:
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = _trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIALS + alphabet, show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIALS]
    return Tokenizer.from_str(json.dumps(content))


def unigram() -> Any:
    return _trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def word_piece() -> Any:
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def framed(tokenizer: Any, single: str) -> Any:
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def _roberta() -> Any:
    tokenizer = byte_level(prefix=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), add_prefix_space=True)
    return tokenizer


def _stripping() -> Any:
    tokenizer = byte_level()
    for flags in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}):
        name = next(iter(flags))
        tokenizer.add_tokens([AddedToken(f"<{name}>", special=name != "normalized", **flags)])
    return tokenizer


Config = dict[str, Any]
FOLDERS: dict[str, tuple[Callable[[], Any], Config]] = {
    "byte level, ChatML": (byte_level, {"chat_template": CHATML}),
    "byte level with a prefix space": (lambda: byte_level(prefix=True), {"chat_template": MISTRAL}),
    "metaspace": (lambda: metaspace("always"), {"chat_template": MISTRAL}),
    "metaspace at the beginning only": (lambda: metaspace("first"), {"chat_template": MARKED}),
    "metaspace without a dummy prefix": (lambda: metaspace("never"), {"chat_template": CHATML}),
    "unigram": (unigram, {"chat_template": CHATML}),
    "word pieces": (lambda: framed(word_piece(), "<s> $A </s>"), {"chat_template": CHATML}),
    "a begin of sequence, Llama 3": (lambda: framed(byte_level(), "<s> $A"), {"chat_template": LLAMA3}),
    "begin and end of sequence": (lambda: framed(byte_level(), "<s> $A </s>"), {"chat_template": MARKED}),
    "RoBERTa": (_roberta, {"chat_template": MARKED}),
    "tools": (byte_level, {"chat_template": TOOLS}),
    "tokens that strip": (_stripping, {"chat_template": CHATML}),
    "several templates": (
        byte_level,
        {"chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]},
    ),
    "tokens of the config": (
        byte_level,
        {
            "chat_template": CHATML.replace("<|im_start|>", "<|turn|>"),
            "extra_special_tokens": ["<|turn|>"],
            "pad_token": "<|pad|>",
            "added_tokens_decoder": {"600": {"content": "<more>", "lstrip": True, "special": False}},
        },
    ),
    "legacy files": (byte_level, {"chat_template": CHATML}),
    "special tokens split": (byte_level, {"chat_template": CHATML, "split_special_tokens": True}),
}


def write_folder(folder: Path, name: str) -> Path:
    """Write one of `FOLDERS`."""
    make, config = FOLDERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name == "legacy files":
        (folder / "special_tokens_map.json").write_text(json.dumps({**named, "eos_token": {"content": "<|im_end|>"}}))
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": 500, "<|mask|>": 501}))
        (folder / "chat_template.jinja").write_text(config["chat_template"])
        named, config = {"mask_token": "<|mask|>"}, {}
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))
    return folder
