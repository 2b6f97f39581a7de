"""Steps of fixed shapes say what eager ones say; one compilation serves a growing text, and others like it."""

import dataclasses
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mtp_lightning.decode import Settings, generate, static
from mtp_lightning.decode.generation import stream
from mtp_lightning.decode.packed_linear import PackedLinear, pack_linear_maps
from mtp_lightning.errors import DecodingError
from tests.decode.oracles import DECODED_KINDS, LENGTH, PROMPTS, TREE, WrittenDrafts, model_of
from tests.support.architectures import architecture_recipe
from tests.support.tiny import tiny_model, tiny_recipe

SAMPLED = {"temperature": 0.9, "seed": 5}
RECIPES = ("parallel", "sequential", "recursive", "causal", "linear", "medusa")
WAYS = (  # rows, drafts, and how tokens are chosen; None for no drafts
    (1, None, {}),
    (3, 1, {}),
    (3, 2, SAMPLED),
    (1, 3, {}),
    (3, 3, {}),
    (1, 2, SAMPLED | {"top_k": 5, "top_p": 0.9}),
    (3, None, SAMPLED | {"top_k": 4}),
)
DRAWN_DRAFTS = SAMPLED | {"sample_drafts": True}


@pytest.fixture
def uncompiled():
    """Steps of fixed shapes as they are: what a GPU would capture if nothing were compiled."""
    with mock.patch.object(static, "_compiled", static._step):
        yield


def chosen(num_drafts, **options):
    drafting = {"decoder": "greedy"} if num_drafts is None else {"draft_length": num_drafts}
    return Settings(**({"max_new_tokens": LENGTH} | drafting | options))


def assert_alike(model, prompts, settings):
    """The same tokens in the same steps."""
    fixed = dataclasses.replace(settings, compile=True)
    expected, found = generate(model, prompts, settings), generate(model, prompts, fixed)
    assert found.tokens == expected.tokens
    assert found.statistics == expected.statistics
    assert found.statistics.is_consistent


def kinds_and_ways():
    for place, kind in enumerate(DECODED_KINDS):
        for number, way in enumerate(WAYS):
            is_daily = number == (place + 1) % len(WAYS)
            yield pytest.param(kind, *way, marks=() if is_daily else pytest.mark.slow)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("kind", "num_rows", "num_drafts", "options"), [*kinds_and_ways()])
def test_fixed_shapes_say_what_eager_steps_say(kind, num_rows, num_drafts, options):
    assert_alike(model_of(kind), PROMPTS[:num_rows], chosen(num_drafts, **options))


def text_of(tokens):
    return bytes(97 + token for token in tokens)


CASES = {
    "stop tokens": (PROMPTS[:3], {"stop_tokens": (3, 5)}),
    "stop strings": (PROMPTS[:3], {"stop_strings": (b"c", b"fd"), "detokenize": text_of}),
    "a prompt beyond the fewest slots": (
        [[token % 13 for token in range(static.FEWEST_SLOTS + 7)], [1]],
        {"max_new_tokens": 12},
    ),
    "one new token": (PROMPTS[:2], {"max_new_tokens": 1}),
    "two new tokens": (PROMPTS[:2], {"max_new_tokens": 2}),
    "drawn drafts": (PROMPTS[:3], DRAWN_DRAFTS),
    "typical": (PROMPTS[:2], SAMPLED | {"typical": True}),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["causal", "recursive", "medusa_replicated"])
@pytest.mark.parametrize("name", CASES)
def test_texts_end_where_eager_texts_end(kind, name):
    prompts, options = CASES[name]
    assert_alike(model_of(kind), prompts, chosen(3, **options))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_trees_of_fixed_shape(options):
    assert_alike(model_of("parallel"), PROMPTS[:3], chosen(None, decoder="tree", tree=TREE, **options))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_texts_fill_the_context(kind):
    """All slots but those for drafts are used: the context is a power of two, or just below."""
    for context in (static.FEWEST_SLOTS, static.FEWEST_SLOTS - 2 * 4 - 1):
        recipe = tiny_recipe(model={"max_position_embeddings": context}, heads={"kind": kind})
        prompt = [token * token % 13 for token in range(context - 20)]
        assert_alike(tiny_model(recipe), [prompt], chosen(3, max_new_tokens=20))


class OldStorages(TorchDispatchMode):
    """Where the tensors lie that a step reads or writes and has not made itself."""

    def __init__(self):
        super().__init__()
        self.made, self.old = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = {tensor.untyped_storage().data_ptr() for tensor in self.made}
        for leaf in tree_flatten((args, kwargs))[0]:
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in made:
                self.old.add(leaf.untyped_storage().data_ptr())
        new = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        self.made += [leaf for leaf in new if leaf.untyped_storage().data_ptr() not in self.old]  # and keeps them
        return result


@pytest.mark.parametrize("options", [{}, DRAWN_DRAFTS])
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_a_step_finds_all_it_reads_where_the_one_before_did(kind, options):
    """Else a CUDA graph would read and write memory that belongs to something else by now."""
    read = []

    def step(*arguments):
        with OldStorages() as storages:
            report = static._step(*arguments)
        read.append(storages.old)
        return report

    with mock.patch.object(static, "_compiled", step):
        [*_] = stream(model_of(kind), PROMPTS[:2], chosen(3, compile=True, **options))
    assert len(read) > 3
    assert all(own == read[0] for own in read), [len(own ^ read[0]) for own in read]


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def traced():
    """Steps that the compiler traces whole and guards, but does not turn into kernels."""
    torch._dynamo.reset()
    kept = torch.compile(static._step, fullgraph=True, dynamic=False, backend="eager")
    with mock.patch.object(static, "_compiled", kept):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced")
def test_one_compilation_serves_a_text_that_grows_and_other_texts():
    model, settings = model_of("sequential"), chosen(3, **DRAWN_DRAFTS)
    before = num_graphs()
    assert_alike(model, PROMPTS[:2], settings)
    assert num_graphs() == before + 1
    assert_alike(model, PROMPTS[2:4], settings)  # of other lengths
    assert_alike(model, PROMPTS[2:4], dataclasses.replace(settings, max_new_tokens=settings.max_new_tokens + 5))
    assert num_graphs() == before + 1
    assert_alike(model, PROMPTS[:1], settings)
    assert num_graphs() == before + 2


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_more_shapes_than_torch_compiles_by_itself():
    before = num_graphs()
    model = model_of("linear")
    for num_rows in range(1, 4):
        for num_drafts in (None, 1, 2, 3):
            generate(model, PROMPTS[:num_rows], chosen(num_drafts, max_new_tokens=9, compile=True))
    assert num_graphs() == before + 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, in its compiler
@pytest.mark.parametrize(("place", "kind"), [*enumerate(RECIPES)])
def test_compiled_steps_say_what_eager_steps_say(place, kind):
    """By inductor, in fp32."""
    heads = {"causal": {"kind": "chained", "order": "causal"}}.get(kind, {"kind": kind})
    model = tiny_model(tiny_recipe(heads=heads), torch.float32)
    torch._dynamo.reset()
    before = num_graphs()
    num_rows, num_drafts = ((1, 3), (3, 2), (3, 3), (1, None), (3, 1), (1, 2))[place]
    assert_alike(model, PROMPTS[:num_rows], chosen(num_drafts, stop_tokens=(7,)))
    assert num_graphs() == before + 1
    torch._dynamo.reset()


def packed_model():
    return pack_linear_maps(tiny_model(tiny_recipe(), torch.bfloat16).requires_grad_(requires_grad=False))


def foreign_model():
    pytest.importorskip("transformers", reason="needs transformers: pip install 'mtp_lightning[transformers]'")
    return tiny_model(architecture_recipe("gpt2"))


@pytest.mark.parametrize(
    ("build", "says"), [(packed_model, "maps are packed.*--dtype fp32"), (foreign_model, "model.family transformers")]
)
def test_models_that_cannot_be_compiled_are_refused(build, says):
    model = build()
    if build is packed_model and not any(isinstance(module, PackedLinear) for module in model.modules()):
        pytest.skip("this processor has no kernels for packed maps")
    with pytest.raises(DecodingError, match=says):
        generate(model, [[1]], compile=True)


def test_what_cannot_be_traced_is_refused():
    drafts = WrittenDrafts(model_of("linear"), PROMPTS[:1], [[1]])
    settings = chosen(3, compile=True)
    with pytest.raises(DecodingError, match=r"torch\.compile must be able to compile a step.*Leave compile away"):
        generate(model_of("linear"), PROMPTS[:1], settings, forced_drafts=drafts)
