"""Packed linear maps: the same maps, and one position's scores whatever stands beside it."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mtp_lightning.decode import Settings, generate
from mtp_lightning.decode.adaptive import step_costs
from mtp_lightning.decode.packed_linear import PackedLinear, pack_linear_maps
from mtp_lightning.decode.state import DecodeState, prefill, verify
from mtp_lightning.recipe.draft_vocabulary import with_draft_ids
from tests.decode.oracles import PROMPTS
from tests.support.architectures import architecture_recipe
from tests.support.covering import some_of
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no kernels for bfloat16"
)
WIDE = {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 200, "num_hidden_layers": 5}


def wide_model(kind, model=WIDE, **sections):
    built = tiny_model(tiny_recipe(model=model, heads=HEAD_KINDS[kind], **sections), torch.bfloat16)
    return built.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (37, 200), (192, 64)])
def test_the_map_is_the_plain_one_and_no_position_looks_at_another(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(*shape, bias=bias, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    packed = PackedLinear(plain)
    hidden = torch.randn(2, 8, shape[0], dtype=torch.bfloat16)
    exact = torch.nn.functional.linear(hidden.double(), plain.weight.double(), plain.bias.double() if bias else None)
    assert_close(packed(hidden).double(), exact, rtol=2**-7, atol=2**-7)
    alone = torch.stack([packed(hidden[:, i]) for i in range(8)], dim=1)
    assert torch.equal(packed(hidden), alone)


@pytest.mark.parametrize("width", [576, 1024, 1030, 1536, 4096])
def test_a_position_that_stands_alone_has_the_scores_that_it_has_beside_others(width):
    torch.manual_seed(0)
    packed = PackedLinear(nn.Linear(width, 1024, bias=False, dtype=torch.bfloat16).requires_grad_(requires_grad=False))
    hidden = (torch.randn(1, 64, width) * torch.randn(1, 64, width).mul(2).exp()).bfloat16()  # outliers, as in models
    for size in (1, 2, 4):
        parts = torch.cat([packed(part) for part in torch.split(hidden, size, dim=1)], dim=1)
        assert torch.equal(packed(hidden), parts)
    assert torch.equal(packed(hidden)[0, 5], packed(hidden[0, 5]))  # (D,) -> (E,)


def check_scores(recipe):
    plain, packed, exact = (tiny_model(recipe, torch.bfloat16).requires_grad_(requires_grad=False) for _ in range(3))
    pack_linear_maps(packed)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) > 0
    scores, wanted, precise = (
        prefill(DecodeState(model, PROMPTS, max_drafts=0, remaining=1, seed=0)).double()
        for model in (packed, plain, exact.float())
    )
    rounding = (wanted - precise).abs().max()
    assert (scores - precise).abs().max() <= 1.5 * rounding
    assert generate(packed, PROMPTS, Settings(max_new_tokens=9)).statistics.num_draft_tokens > 0


@pytest.mark.parametrize("kind", some_of(sorted(HEAD_KINDS), one_in=2))
def test_a_model_decodes_with_the_scores_that_it_had(kind):
    check_scores(tiny_recipe(model=WIDE, heads=HEAD_KINDS[kind]))


@pytest.mark.parametrize("name", some_of(["gemma2", "phi3", "falcon", "deepseek_v3", "mixtral", "cohere"], one_in=2))
def test_so_does_a_decoder_of_transformers(name):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'mtp_lightning[transformers]'")
    recipe = architecture_recipe(name, heads={"kind": "sequential", "num_offsets": 3})
    check_scores(recipe)


def test_drafts_are_scored_by_rows_of_the_matrix():
    ids = list(range(0, 200, 3))
    recipe = tiny_recipe(model=WIDE, heads=HEAD_KINDS["sequential"] | {"draft_vocabulary": len(ids)})
    check_scores(with_draft_ids(recipe, ids))


def test_updates_and_embeddings_stay_as_they_are():
    plain = wide_model("sequential", adapt={"lora": {}}, model=WIDE | {"tie_word_embeddings": True})
    packed = pack_linear_maps(copy.deepcopy(plain))
    assert type(packed.trunk.layers[0].self_attn.q_proj) is type(plain.trunk.layers[0].self_attn.q_proj)
    assert torch.equal(packed.trunk.embed_tokens.weight, plain.trunk.embed_tokens.weight)
    numbers = [sum(parameter.numel() for parameter in model.parameters()) for model in (plain, packed)]
    assert numbers[1] - numbers[0] == plain.trunk.embed_tokens.weight.numel()  # the matrix has a copy of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_are_left_alone(dtype):
    model = pack_linear_maps(wide_model("parallel").to(dtype))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("kind", some_of(sorted(HEAD_KINDS), one_in=2, first=1))
def test_drafting_changes_not_one_bit(kind):
    """Scores of a step with drafts are those of steps without, so that no tie is settled otherwise."""
    model = pack_linear_maps(wide_model(kind, WIDE | {"num_attention_heads": 6, "num_key_value_heads": 2}))
    prompt = torch.randint(200, (57,), generator=torch.Generator().manual_seed(0)).tolist()
    text = generate(model, [prompt], Settings(max_new_tokens=31, decoder="greedy")).tokens[0]
    plain = fed_scores(model, prompt, text, size=1)
    for size in (2, 3, 5):
        assert torch.equal(fed_scores(model, prompt, text, size=size), plain)


@torch.inference_mode()
def fed_scores(model, prompt, text, *, size):
    """The main head's scores of a text that is fed so many tokens at a time, (30, V)."""
    session = DecodeState(model, [prompt], max_drafts=0, remaining=40, seed=0)
    prefill(session)
    session.tokens[0, len(prompt)] = text[0]
    session.note_progress()
    scores = []
    for start in range(0, 30, size):
        scores.append(verify(session, torch.tensor([text[start + 1 : start + size]], dtype=torch.long))[0])
        session.commit(torch.tensor([text[start + 1 : start + size + 1]]), torch.tensor([size - 1]))
        session.note_progress()
    return torch.cat(scores)


def test_positions_that_packed_maps_verify_count_as_cheap():
    """What another draft costs is its module and its scores, hardly the position that it takes."""
    plain = wide_model("parallel")
    costs = step_costs(plain, 3), step_costs(pack_linear_maps(copy.deepcopy(plain)), 3)
    assert costs[1][0] == costs[0][0]
    assert all(packed < other for packed, other in zip(costs[1][1:], costs[0][1:], strict=True))
