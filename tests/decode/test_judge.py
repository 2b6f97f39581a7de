"""transformers as the judge: its cached generation says what ours says, and drafts as often as ours.

A `sequential` model is written as an ordinary Llama folder with DeepSeek's names for the modules, which transformers
reads as its own MTP layers. Needs the extra `judge`. Prompts hold more tokens than there are modules: transformers
5.23 fails at shorter ones, because it takes back a row per module after every rejection.
"""

import pytest
import torch

from mtp_lightning.decode import generate
from tests.support.tiny import tiny_model, tiny_recipe

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers with MTP: pip install 'mtp_lightning[judge]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [12, 0, 12, 3, 4, 4, 9, 1, 1, 2], [5, 6, 7, 8, 9, 10, 11]]
NEW_TOKENS = 41


def model_of(num_offsets, **model):
    recipe = tiny_recipe(
        heads={"kind": "sequential", "num_offsets": num_offsets, "layers_from_trunk": False},
        model={"num_hidden_layers": 3, "initializer_range": 0.15, **model},
    )
    model = tiny_model(recipe, torch.float32).requires_grad_(requires_grad=False)
    for block in model.heads.blocks:  # lean on the token in between, as the trunk does: then drafts are right at times
        block.eh_proj.weight.mul_(0.5)
        block.eh_proj.weight[:, : recipe.model.hidden_size] += torch.eye(recipe.model.hidden_size)
    return model


def llama_config(model, **extra):
    section = model.section
    return transformers.LlamaConfig(
        hidden_size=section.hidden_size,
        intermediate_size=section.resolved_intermediate_size,
        num_hidden_layers=len(model.trunk.layers),
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.resolved_key_value_heads,
        vocab_size=section.vocab_size,
        max_position_embeddings=section.max_position_embeddings,
        rms_norm_eps=section.norm_eps,
        rope_theta=section.rope_theta,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **extra,
    )


def trunk_tensors(model):
    tensors = {f"model.{name}": value.clone() for name, value in model.trunk.state_dict().items()}
    tensors["model.norm.weight"] = model.unembedding.norms[0].weight.clone()
    tensors["lm_head.weight"] = model.unembedding.lm_heads[0].weight.clone()
    return tensors


def module_tensors(model):
    tensors = {}
    for depth, block in enumerate(model.heads.blocks):
        prefix = f"model.layers.{len(model.trunk.layers) + depth}."
        tensors |= {prefix + name.removeprefix("layers.0."): value for name, value in block.state_dict().items()}
        tensors[f"{prefix}shared_head.norm.weight"] = model.unembedding.norms[depth + 1].weight
    return {name: value.clone() for name, value in tensors.items()}


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_plain_greedy_says_what_transformers_says(key_value_heads):
    model = model_of(1, num_key_value_heads=key_value_heads)
    judge = transformers.LlamaForCausalLM(llama_config(model)).eval()
    assert judge.load_state_dict(trunk_tensors(model), strict=False).missing_keys == []
    made = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS)
    for prompt, text in zip(PROMPTS, made.tokens, strict=True):
        said = judge.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert said[0, len(prompt) :].tolist() == text


@pytest.mark.parametrize("num_offsets", [2, 3, 4])
def test_drafting_takes_as_many_steps_as_in_transformers(num_offsets, tmp_path):
    from safetensors.torch import save_file

    model = model_of(num_offsets)
    num_layers = len(model.trunk.layers)

    class WithModules(transformers.LlamaForCausalLM):
        _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
            rf"model\.layers\.{num_layers + depth}\..*" for depth in range(num_offsets - 1)
        ]

    llama_config(model, num_mtp_layers=num_offsets - 1).save_pretrained(tmp_path)
    save_file(trunk_tensors(model) | module_tensors(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    judge = WithModules.from_pretrained(tmp_path, dtype=torch.float32).eval()
    forwards = []
    judge.model.register_forward_hook(lambda *_: forwards.append(1))
    made = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS)
    steps = []
    for prompt, text in zip(PROMPTS, made.tokens, strict=True):
        forwards.clear()
        said = judge.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, use_mtp=True)
        assert said[0, len(prompt) :].tolist() == text
        steps.append(len(forwards) - 1)  # the first reads the prompt
    assert steps == [len(row) for row in made.statistics.accepted_by_row]
    assert 0 < made.statistics.num_accepted_tokens < made.statistics.num_draft_tokens
