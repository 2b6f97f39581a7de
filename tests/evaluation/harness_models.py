"""A small model of transformers with a tokenizer, ours with heads made of it, and the folder that ours becomes."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from tests.data.tokenizer_folders import write_folder

CONTEXT = 96
WORDS = ["the", "quick", "brown", "fox", "said", "naïve", "café", "地图", "and", "37", "lazy", "dogs", "🦊", "jumped"]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} is",
        "doc_to_choice": ["a", "b", "c"],
        "doc_to_target": "{{gold}}",
    },
    "last_words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{opening}}",
        "doc_to_target": " {{closing}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "fox"], "max_gen_toks": 20},
        "metric_list": [{"metric": "exact_match"}, {"metric": "rougeL"}],
    },
}


def write_model(transformers: Any, folder: Path, tokenizer: str) -> Path:
    """Write `hf` (transformers), `ours` (three offsets) and `exported`; return the folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=768,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    write_folder(folder / "hf", tokenizer)
    import_folder(folder / "hf", folder / "ours", Wanted(num_offsets=3))
    export_model(folder / "ours", folder / "exported")
    return folder


def write_byte_model(transformers: Any, folder: Path) -> Path:
    """Write `hf` without a tokenizer, `ours` (bytes), and `exported` with one of bytes; return the folder."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=257,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=256,
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder / "hf")
    import_folder(folder / "hf", folder / "ours", Wanted(num_offsets=2))
    export_model(folder / "ours", folder / "exported")
    characters = {text: number for number, text in bytes_to_unicode().items()}
    tokenizer: Any = Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")
    fast.save_pretrained(folder / "exported")
    return folder


def bytes_to_unicode() -> dict[int, str]:
    """Return the characters that byte-level tokenizers write bytes as."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def documents() -> list[dict[str, Any]]:
    """Documents that all tasks read: texts of many lengths, some longer than the context, one empty."""
    made = []
    for number in range(12):
        words = WORDS[number % 7 :] + WORDS[: number % 5]
        length = (3, 8, 14, 150)[number % 4]
        made.append(
            {
                "question": " ".join((words * 12)[:length]),
                "choices": [words[0], " ".join(words[2:6]), f"{words[1]} {number}"],
                "gold": number % 3,
                "opening": "" if number == 5 else " ".join((words * 12)[:length]) + " " * (number % 2),
                "closing": " ".join(words[3 : 4 + number % 3]),
                "text": "" if number == 7 else "\n".join((words * 12)[: 2 * length]),
                "answer": words[number % 3],
            }
        )
    return made


def write_tasks(folder: Path, documents: list[dict[str, Any]]) -> Path:
    """Write the task files, and the data that they read."""
    folder.mkdir(exist_ok=True)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents))
    for name, task in TASKS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **files, "fewshot_split": "test", **task}))
    return folder
