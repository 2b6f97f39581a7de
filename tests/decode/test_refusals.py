"""What a model cannot generate with is refused before it runs, in three parts."""

import pytest

from mtp_lightning.decode import Settings, Tree, generate
from mtp_lightning.errors import DecodingError
from tests.decode.oracles import model_of
from tests.support.tiny import tiny_model, tiny_recipe

CHAIN = Tree((0, 1), (0, 0))


@pytest.mark.parametrize(
    ("kind", "prompts", "options", "says"),
    [
        ("parallel", [], {}, "must be a prompt; found none"),
        ("parallel", [[1], []], {}, "must hold a token; found prompt 2 of 2"),
        ("parallel", [[1, 13]], {}, "must lie in 0 to V - 1 = 12; found id 13 in prompt 1"),
        ("parallel", [[-1]], {}, "found id -1"),
        ("parallel", [[1] * 4000], {"max_new_tokens": 97}, "max_position_embeddings = 4,096.*Ask for at most 96 new"),
        ("parallel", [[1] * 5000], {}, "5,000 tokens.*Cut the prompt below 4,096"),
        ("parallel", [[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("parallel", [[1]], {"draft_length": 4}, r"must lie in 1 to n - 1 = 3; found 4\. Give at most 3"),
        ("parallel", [[1]], {"draft_length": 0}, "found 0"),
        ("parallel", [[1]], {"draft_length": "long"}, "found 'long'"),
        ("parallel", [[1]], {"draft_length": 2, "decoder": "greedy"}, "needs a decoder that drafts"),
        ("parallel", [[1]], {"decoder": "chain"}, "decoder chain must fit.*ParallelHeads.*auto, greedy, blockwise"),
        ("sequential", [[1]], {"decoder": "blockwise"}, "SequentialHeads with n = 4.*auto, greedy, chain"),
        ("sequential", [[1]], {"decoder": "tree", "tree": CHAIN}, "decoder tree must fit"),
        ("parallel", [[1]], {"decoder": "magic"}, "found 'magic'"),
        ("parallel", [[1]], {"decoder": "tree"}, "decoder tree needs a tree"),
        ("parallel", [[1]], {"decoder": "tree", "tree": Tree((), ())}, "1 to 64 drafts; found 0"),
        (
            "parallel",
            [[1]],
            {"decoder": "tree", "tree": Tree((0, 1, 2, 3), (0,) * 4)},
            "n - 1 = 3 deep; found .0, 1, 2, 3",
        ),
        ("parallel", [[1]], {"decoder": "tree", "tree": Tree((0, 0), (1, 1))}, "different ranks"),
        ("parallel", [[1]], {"decoder": "tree", "tree": Tree((0, 2), (0, 0))}, "parents before"),
        ("parallel", [[1]], {"decoder": "tree", "tree": Tree((0,), (13,))}, "0 to 12"),
        ("parallel", [[1]], {"temperature": -1.0}, "temperature must be 0, or a finite number"),
        ("parallel", [[1]], {"temperature": 1e-300}, "from 1e-30 on; found 1e-300"),
        ("parallel", [[1]], {"temperature": float("inf")}, "finite number"),
        ("parallel", [[1]], {"temperature": float("nan")}, "finite number"),
        ("parallel", [[1]], {"seed": 10**30}, "a seed must be a whole number of 64 bits; found 10{30}"),
        ("parallel", [[1]], {"decoder": "tree", "tree": Tree((1, 0), (0, 0))}, "parents before"),
        ("parallel", [[1]], {"top_k": 3}, "need a temperature above 0"),
        ("parallel", [[1]], {"temperature": 1.0, "top_p": 1.5}, "top-p must lie"),
        ("parallel", [[1]], {"temperature": 1.0, "top_k": 0}, "top-k must be"),
        ("parallel", [[1]], {"typical": True}, "typical acceptance needs a temperature"),
        ("parallel", [[1]], {"sample_drafts": True}, "drawing drafts needs a temperature"),
        ("parallel", [[1]], {"temperature": 1.0, "typical": True, "sample_drafts": True}, "verified losslessly"),
        (
            "parallel",
            [[1]],
            {"compile": True, "draft_length": "adaptive"},
            "have as many drafts; found draft_length adap",
        ),
        ("parallel", [[1]], {"stop_strings": [b"x"]}, "stop strings need `detokenize`"),
        ("parallel", [[1]], {"stop_strings": [b""], "detokenize": bytes}, "must hold a character; found an empty one"),
    ],
)
def test_refusal(kind, prompts, options, says):
    with pytest.raises(DecodingError, match=says) as caught:
        generate(model_of(kind), prompts, **options)
    assert caught.value.hint


def test_a_model_with_one_offset_drafts_nothing():
    model = tiny_model(tiny_recipe(heads={"num_offsets": 1}))
    assert generate(model, [[1]], max_new_tokens=3).decoder == "greedy"
    for options in ({"decoder": "blockwise"}, {"draft_length": 1}, {"draft_length": "adaptive"}):
        with pytest.raises(DecodingError, match="one offset"):
            generate(model, [[1]], **options)


def test_unknown_options_are_no_settings():
    with pytest.raises(TypeError, match="max_tokens"):
        generate(model_of("parallel"), [[1]], max_tokens=3)
    assert Settings().draft_length is None
