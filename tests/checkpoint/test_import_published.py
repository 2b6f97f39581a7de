"""Settings of published models, read as they are: the parameters that follow are those of their model cards."""

from pathlib import Path

import pytest

from mtp_lightning.checkpoint.huggingface.configs import Config
from mtp_lightning.checkpoint.huggingface.families import family_of, section_of
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.recipe import Recipe

LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False, "rope_theta": 1e6}
PYTHIA = {"model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000}
SHAPES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
MODELS = {
    "Llama-2-7b": (6_738_415_616, (4096, 32, 32, 32, 11008, 32000), LLAMA),
    "Llama-3.1-8B": (
        8_030_261_248,
        (4096, 32, 32, 8, 14336, 128256),
        LLAMA | {"rope_scaling": LLAMA3 | {"factor": 8.0}},
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        (2048, 16, 32, 8, 8192, 128256),
        LLAMA | {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 64},
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        (4096, 32, 32, 8, 14336, 32768),
        {"model_type": "mistral", "sliding_window": None},
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        (896, 24, 14, 2, 4864, 151936),
        QWEN | {"model_type": "qwen2", "tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 24},
    ),
    "Qwen2.5-7B": (7_615_616_512, (3584, 28, 28, 4, 18944, 152064), QWEN | {"model_type": "qwen2"}),
    "Qwen3-0.6B": (
        596_049_920,
        (1024, 28, 16, 8, 3072, 151936),
        QWEN | {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
    ),
    "Qwen3-8B": (8_190_735_360, (4096, 36, 32, 8, 12288, 151936), QWEN | {"model_type": "qwen3", "head_dim": 128}),
    "Pythia-410m": (405_334_016, (1024, 24, 16, None, 4096, 50304), PYTHIA),
    "Pythia-1b": (1_011_781_632, (2048, 16, 8, None, 8192, 50304), PYTHIA),
    "Pythia-2.8b": (2_775_208_960, (2560, 32, 32, None, 10240, 50304), PYTHIA),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_has_the_parameters_of_its_card(name: str) -> None:
    expected, shape, settings = MODELS[name]
    values = dict(zip(SHAPES, shape, strict=True)) | {"max_position_embeddings": 2048} | settings
    config = Config(Path("config.json"), values)
    section = section_of(config, family_of(config))
    recipe = Recipe.model_validate({"model": section.model_dump(), "heads": {"num_offsets": 1}})
    assert parameter_counts(recipe).total == expected
