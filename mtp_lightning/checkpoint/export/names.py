"""Names of the formats that `mtp export` writes, and what others call them; needs no torch."""

from collections.abc import Mapping
from difflib import get_close_matches
from enum import StrEnum


class FormatName(StrEnum):
    """What can be written."""

    consolidated = "consolidated"
    trunk = "trunk"
    hf_mtp = "hf_mtp"
    mimo = "mimo"
    qwen3_5 = "qwen3_5"
    eagle = "eagle"
    medusa = "medusa"
    gguf_ready = "gguf-ready"


SPELLINGS: Mapping[FormatName, str] = {
    FormatName.consolidated: "native own full all whole checkpoint mtp_lightning consolidate",
    FormatName.trunk: "hf huggingface transformers safetensors llama mistral qwen2 qwen3 gpt_neox base plain backbone "
    "next_token pytorch vllm sglang",
    FormatName.hf_mtp: "deepseek deepseek_v3 deepseek_mtp nextn mtp hf_deepseek transformers_mtp modules",
    FormatName.mimo: "mimo_mtp mimo_7b xiaomi",
    FormatName.qwen3_5: "qwen qwen35 qwen3.5 qwen3_5_text qwen3_5_mtp qwen3_next qwen3_next_mtp",
    FormatName.eagle: "eagle1 eagle2 eagle3 eagle_1 eagle_3 eagle3_t2 speculators drafter",
    FormatName.medusa: "medusa_1 medusa_2 medusa1 medusa2 medusa_heads tgi",
    FormatName.gguf_ready: "gguf gguf_f16 llama.cpp llama_cpp llamacpp llama-cpp ollama lmstudio",
}
"""Other words for a format: engines, layouts, and our own former names."""


def format_named(told: str) -> FormatName:
    """Find a format by its name.

    Raises:
        ValueError: There is none; says what the word is called here, and all names.
    """
    plain = told.strip().lower().replace("-", "_").replace(" ", "_")
    for name in FormatName:
        if told == name.value:
            return name
    meant = next((name for name, words in SPELLINGS.items() if plain in _plain(words)), None)
    by_plain = {name.value.replace("-", "_"): name for name in FormatName}
    near = get_close_matches(plain, by_plain, n=1)
    meant = meant or by_plain.get(plain) or (by_plain[near[0]] if near else None)
    said = f"must be one of {', '.join(name.value for name in FormatName)}, not {told!r}"
    raise ValueError(f"{said}. It is called {meant.value} here: --format {meant.value}" if meant else said)


def _plain(words: str) -> set[str]:
    return {word.replace("-", "_") for word in words.split()}
