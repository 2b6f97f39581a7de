"""A decoder of transformers as the trunk: scores as its own forward computes them, for every architecture."""

import pytest
import torch

from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.model.transformers_architecture import Architecture
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.architectures import COMMON, SETTINGS, architecture_recipe, judge_of, settings_of

pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[transformers]'"
)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def perturbed(recipe: Recipe) -> MtpModel:
    """The recipe's model with noise on every parameter, so that nothing is zero or one by construction."""
    model = build_model(recipe).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens_of(model: MtpModel, num_positions: int = 11) -> torch.Tensor:
    return torch.randint(model.section.vocab_size, (3, num_positions), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_main_head_scores_as_in_transformers(name: str) -> None:
    recipe = architecture_recipe(name, data={"document_mask": False})
    model = perturbed(recipe)
    tokens = tokens_of(model)
    with torch.no_grad():
        hidden = model.hidden_states(tokens, torch.zeros_like(tokens), [1])[1]
        ours = model.unembedding.logits(1, hidden)
        theirs = judge_of(model)(input_ids=tokens[:, : hidden.shape[1]]).logits
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "qwen3_next"])
def test_documents_do_not_see_each_other(name: str) -> None:
    model = perturbed(architecture_recipe(name, data={"document_mask": True}))
    tokens = tokens_of(model)
    documents = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3]).expand(3, -1)
    with torch.no_grad():
        hidden = model.hidden_states(tokens, documents, [1])[1]
        packed = model.unembedding.logits(1, hidden)
        judge = judge_of(model)
        alone = torch.cat([judge(input_ids=part).logits for part in tokens.split([3, 1, 4, 3], 1)], 1)
    torch.testing.assert_close(packed, alone[:, : packed.shape[1]], **TOLERANCE)


DRAWS = {
    "biogpt": {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4, "layerdrop": 0.4},
    "gpt2": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4},
    "opt": {"dropout": 0.4, "layerdrop": 0.4},
    "starcoder2": {"residual_dropout": 0.4, "embedding_dropout": 0.4},
    "mixtral": {"router_jitter_noise": 0.4},
    "phimoe": {"input_jitter_noise": 0.4},  # and samples its experts
    "dbrx": {
        "resid_pdrop": 0.4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4, "attn_pdrop": 0.4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_jitter_eps": 0.4},
    },
}


@pytest.mark.parametrize("name", DRAWS)
def test_training_draws_no_random_numbers(name: str) -> None:
    """The backward orders would not agree, nor a frozen trunk with the one that decodes."""
    model = build_model(architecture_recipe(name, settings=DRAWS[name], data={"document_mask": False}))
    tokens = tokens_of(model)
    with torch.no_grad():
        decoding, training, again = (
            model.train(mode).hidden_states(tokens, torch.zeros_like(tokens), [1, 2, 3]) for mode in (False, True, True)
        )
    for offset in decoding:
        assert torch.equal(training[offset], again[offset])
        assert torch.equal(training[offset], decoding[offset])


REFUSED = {
    "a part between the last norm and the unembedding": (
        "modernbert-decoder",
        {"pad_token_id": 0},
        r"it has lm_head \(ModernBertDecoderPredictionHead\)",
    ),
    "layers that are two each": (
        "longcat_flash",
        {"num_layers": 2, "num_hidden_layers": 4, "head_dim": 4, "qk_rope_head_dim": 4, "zero_expert_num": 2},
        r"num_hidden_layers is 4, and its lists are model\.layers of 2",
    ),
    "layers that go by an earlier one's choice": (
        "glm_moe_dsa",
        {"indexer_types": ["full", "shared", "full"], "n_routed_experts": 4},
        r"which positions an earlier one chose \(indexer_types: \['full', 'shared', 'full'\]\)",
    ),
    "layers that read the tokens again": ("zamba", {}, "read embedded tokens besides the state"),
    "no stack of layers": ("bert", {}, "BertLMHeadModel is none"),
    "an encoder and a decoder": ("bart", {}, "BartForCausalLM is none"),
    "no decoder that predicts": ("t5", {}, "T5Config is none"),
    "narrower tokens": ("opt", {"word_embed_proj_dim": 16}, "not as wide as the states, 32"),
    "unknown": ("lama", {}, "model_type = 'lama'"),
    "a setting of the wrong kind": ("llama", {"hidden_size": "wide"}, "LlamaConfig takes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_trunk_is_refused_by_name(case: str) -> None:
    name, changed, words = REFUSED[case]
    settings = {"model_type": name, **COMMON, **SETTINGS.get(name, {}), **changed}
    with pytest.raises(CheckpointError, match=words):
        Architecture(settings)


def test_layers_that_are_not_built_of_settings_and_a_number_leave_heads_without_layers() -> None:
    settings = {
        "model_type": "openai-gpt",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 61,
    }
    model = {"family": "transformers", "hf_config": settings | {"tie_word_embeddings": False}}
    heads = {"num_offsets": 3, "layers_from_trunk": False}
    with torch.device("meta"):
        MtpModel(Recipe.model_validate({"model": model, "heads": heads | {"kind": "medusa"}}))
        with pytest.raises(CheckpointError, match=r"heads\.kind must be one without layers"):
            MtpModel(Recipe.model_validate({"model": model, "heads": heads | {"kind": "sequential"}}))


def test_states_that_are_carried_on_cannot_be_kept_inside_a_document() -> None:
    with pytest.raises(CheckpointError, match=r"data\.document_mask must be false"), torch.device("meta"):
        MtpModel(architecture_recipe("qwen3_next", data={"document_mask": True}))


BIAS, INDEXER = "e_score_correction_bias", ".indexer."
UNTRAINED = {"afmoe": ("expert_bias",), "deepseek_v3": (BIAS,), "deepseek_v32": (BIAS, INDEXER), "llama": ()}


@pytest.mark.parametrize("name", UNTRAINED)
def test_what_its_class_takes_no_gradient_of_is_never_trained(name: str) -> None:
    """What chooses experts or keys has no gradient: a buffer, a frozen parameter, a module under `no_grad`."""
    recipe = architecture_recipe(name)
    model = build_model(recipe)
    freeze(model, recipe)
    tokens = tokens_of(model)
    hidden = model.hidden_states(tokens, torch.zeros_like(tokens))
    sum(state.square().sum() for state in hidden.values()).backward()  # type: ignore[union-attr]
    parts = {**dict(model.trunk.named_parameters()), **dict(model.heads.named_parameters())}
    trained = {name for name, one in parts.items() if one.requires_grad}
    assert {name for name, one in parts.items() if one.grad is not None} == trained
    fixed = {*parts} - trained
    assert [one for one in fixed if not any(part in one for part in UNTRAINED[name])] == []
    assert [
        part for part in UNTRAINED[name] if not any(part in one and one.startswith("blocks") for one in fixed)
    ] == []


def test_what_reads_images_and_sounds_is_never_trained() -> None:
    """Of Phi-4-multimodal a text reaches the embedding and the layers."""
    seeing = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    image = {"num_hidden_layers": 1, "image_size": 28, "crop_size": 28, "image_token_id": 50}
    sound = {"num_blocks": 1, "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "input_size": 16}
    settings = COMMON | {"model_type": "phi4_multimodal", "pad_token_id": 0, "vision_config": seeing | image}
    settings["audio_config"] = seeing | sound | {"nemo_conv_channels": 16, "audio_token_id": 51}
    heads = {"num_offsets": 2, "kind": "medusa", "layers_from_trunk": False}
    recipe = Recipe.model_validate({"model": {"family": "transformers", "hf_config": settings}, "heads": heads})
    model = build_model(recipe)
    freeze(model, recipe)
    tokens = tokens_of(model)
    hidden = model.hidden_states(tokens, torch.zeros_like(tokens))
    sum(state.square().sum() for state in hidden.values()).backward()  # type: ignore[union-attr]
    parts = dict(model.trunk.named_parameters())
    assert {name for name, one in parts.items() if one.grad is None} == {
        name for name, one in parts.items() if not one.requires_grad
    }
    assert {name.split(".")[1] for name, one in parts.items() if not one.requires_grad} == {"embed_tokens_extend"}


def test_a_field_that_transformers_reads_otherwise_is_refused() -> None:
    """A setting that is absent means what the class makes of it: tied, for Gemma."""
    settings = settings_of("gemma")
    del settings["tie_word_embeddings"]
    recipe = Recipe.model_validate({"model": {"family": "transformers", "hf_config": settings}})
    with pytest.raises(CheckpointError, match=r"model\.tie_word_embeddings must be"), torch.device("meta"):
        MtpModel(recipe)


def test_constants_survive_casts_and_have_memory_of_their_own() -> None:
    model = build_model(architecture_recipe("gemma3_text")).to(torch.bfloat16)
    buffers = dict(model.trunk.named_buffers())
    assert any(name.endswith("inv_freq") for name in buffers)
    assert {buffer.dtype for name, buffer in buffers.items() if name.endswith("inv_freq")} == {torch.float32}
    assert all(buffer.isfinite().all() and buffer.abs().sum() > 0 for buffer in buffers.values())
