"""Laws 6, 7 and 8 over tiny decoders of transformers, with that library's own generation as the judge."""

from dataclasses import replace

import pytest
import torch

from mtp_lightning.decode import Settings, applicable_decoders, generate, transformers_windows
from mtp_lightning.decode.sampling import Sampling
from mtp_lightning.decode.state import DecodeState, keep_path, prefill, verify, verify_tree
from mtp_lightning.decode.transformers_windows import spans_of
from mtp_lightning.decode.tree import TreeTables
from mtp_lightning.errors import DecodingError
from mtp_lightning.evaluation.lens import layer_states
from mtp_lightning.evaluation.marginal import laws_ahead
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.transformers_architecture import architecture_of
from tests.decode.oracles import TREE, WrittenDrafts, full_logits, plain_text
from tests.laws.test_decoding import predicted_counts
from tests.laws.test_decoding_law import deviation, exact_law
from tests.support.architectures import SETTINGS, architecture_recipe
from tests.support.covering import some_of
from tests.support.tiny import HEAD_KINDS, tiny_model

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[transformers]'"
)
PROMPTS = [[5, 6, 7], [9, 3, 11, 60, 3, 4, 17, 33, 45, 4, 50, 12], [20]]
LENGTH = 16
RECURRENT = ("qwen3_next",)
BY_SLOT = ("bloom", "mpt")
NAMES = [name for name in SETTINGS if name not in RECURRENT]
KINDS = ("medusa", "sequential", "parallel", "recursive", "causal")
QUICK = {
    ("gemma2", "sequential"),
    ("phi3", "parallel"),
    ("bloom", "medusa"),
    ("qwen3_moe", "recursive"),
}
MARKS = (pytest.mark.matrix, pytest.mark.slow)
TEXTS, SCORES = range(2)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def over_all(law):
    """Every pair of name, kind and law: one of two laws in turn is checked of a name with a kind, the other by hand."""
    names_and_kinds = [(name, kind) for name in NAMES for kind in KINDS]
    turns = [(NAMES.index(name) + KINDS.index(kind)) % 2 for name, kind in names_and_kinds]
    marks = [() if cell in QUICK else MARKS[turn == law] for cell, turn in zip(names_and_kinds, turns, strict=True)]
    cells = [pytest.param(*cell, marks=mark) for cell, mark in zip(names_and_kinds, marks, strict=True)]
    return pytest.mark.parametrize(("name", "kind"), cells)


def model_of(name: str, kind: str = "sequential", **settings) -> MtpModel:
    """A tiny decoder with random weights; untied, as texts of tied ones repeat one token."""
    heads = HEAD_KINDS[kind] | {"num_offsets": 4}
    if kind != "medusa":
        heads["layers_from_trunk"] = False
    recipe = architecture_recipe(name, heads=heads, settings={"tie_word_embeddings": False, **settings})
    return tiny_model(recipe, torch.float32).eval().requires_grad_(requires_grad=False)


def judge_of(model: MtpModel) -> torch.nn.Module:
    """The same weights in transformers' own class; for kinds whose main head is the trunk's last state."""
    architecture = architecture_of(model.section)
    config = transformers.AutoConfig.for_model(**model.section.hf_config)
    judge = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=architecture.config._attn_implementation
    ).eval()
    state = {
        theirs: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if (theirs := architecture.names.theirs(name))
    }
    assert not any(judge.load_state_dict(state, strict=False))
    judge.generation_config.eos_token_id = None
    return judge


def said_by(judge, prompt, length=LENGTH):
    said = judge.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, use_cache=True)
    return said[0, len(prompt) :].tolist()


@over_all(TEXTS)
def test_drafts_change_no_text(name, kind):
    """Law 6: rows of different lengths, windows shorter than the text, right and wrong drafts, trees, any length."""
    model = model_of(name, kind)
    expected = [plain_text(model, tuple(prompt), LENGTH + 4) for prompt in PROMPTS]
    if kind in ("medusa", "sequential"):
        judge = judge_of(model)
        assert [said_by(judge, prompt, LENGTH + 4) for prompt in PROMPTS] == expected
    texts = [[*prompt, *text] for prompt, text in zip(PROMPTS, expected, strict=True)]
    expected = [text[:LENGTH] for text in expected]
    for decoder in applicable_decoders(model):
        made = generate(
            model, PROMPTS, decoder=decoder, tree=TREE if decoder == "tree" else None, max_new_tokens=LENGTH
        )
        assert made.tokens == expected, decoder
        if decoder in ("blockwise", "chain"):
            assert_counts(model, texts, made.statistics.accepted_by_row)
    assert generate(model, PROMPTS, draft_length="adaptive", max_new_tokens=LENGTH).tokens == expected
    drafts = WrittenDrafts(model, PROMPTS, [[3], [2, 1], [0, 3]])
    made = generate(model, PROMPTS, max_new_tokens=LENGTH, forced_drafts=drafts)
    assert made.tokens == expected
    assert 0 < made.statistics.num_accepted_tokens < made.statistics.num_draft_tokens


def assert_counts(model, texts, accepted_by_row):
    """Law 7: steps keep as many drafts as a pass over the finished text says."""
    for prompt, text, accepted in zip(PROMPTS, texts, accepted_by_row, strict=True):
        choices = {offset: logits.argmax(-1).tolist() for offset, logits in full_logits(model, text).items()}
        assert accepted == predicted_counts(choices, prompt, text, 3)


def test_texts_of_the_table_say_something():
    """Without this, the law above could hold of masks that are wrong."""
    for name, kind in QUICK:
        texts = [plain_text(model_of(name, kind), tuple(prompt), LENGTH + 4) for prompt in PROMPTS]
        assert max(len({*text}) for text in texts) > 5, name


def test_windows_of_the_wrong_width_are_noticed(monkeypatch):
    """The law fails where layers look back too far, or not far enough."""
    model = model_of("gemma2")
    expected = [plain_text(model, tuple(prompt), LENGTH) for prompt in PROMPTS]
    for width in (None, 4, 6):
        wrong = [replace(span, window=width if span.window else None) for span in spans_of(model)]
        monkeypatch.setitem(transformers_windows._SPANS, model.trunk, wrong)
        assert generate(model, PROMPTS, max_new_tokens=LENGTH).tokens != expected, width


@over_all(SCORES)
def test_scores_after_any_history_are_those_of_a_full_pass(name, kind):
    """Law 8, for chains and trees in turn."""
    model = model_of(name, kind)
    session = DecodeState(model, PROMPTS, max_drafts=3, remaining=60, seed=0)
    session.tokens.scatter_(1, session.prompt_lengths[:, None], prefill(session).argmax(-1)[:, None])
    session.note_progress()
    generator = torch.Generator().manual_seed(0)
    for num_drafts in (3, 0, 2, 3):
        drafts = torch.randint(model.section.vocab_size, (len(PROMPTS), num_drafts), generator=generator)
        scores = verify(session, drafts)
        for row, length in enumerate(session.lengths.tolist()):
            text = [*session.tokens[row, : length + 1].tolist(), *drafts[row].tolist()]
            torch.testing.assert_close(scores[row], full_logits(model, text, model.heads.chain(1))[1][length:], **CLOSE)
        accepted = torch.tensor([num_drafts, 0, num_drafts // 2])
        following = torch.randint(model.section.vocab_size, (len(PROMPTS), 1), generator=generator)
        session.commit(torch.cat((drafts, following), 1).scatter(1, accepted[:, None], following), accepted)
        session.note_progress()
        if name not in BY_SLOT:
            check_tree(session, generator)


def check_tree(session, generator):
    """Every node is scored as the last token of its own path; one path is then made the past."""
    model, tables = session.model, TreeTables(TREE, torch.device("cpu"))
    nodes = torch.randint(model.section.vocab_size, (len(PROMPTS), TREE.num_drafts + 1), generator=generator)
    nodes[:, 0] = session.tokens.gather(1, session.lengths[:, None])[:, 0]
    scores, states = verify_tree(session, nodes, tables.depths, tables.ancestry)
    for row, length in enumerate(session.lengths.tolist()):
        for node in (0, 4, 9):
            path = tables.paths[node, : int(tables.depths[node]) + 1].tolist()
            text = session.tokens[row, :length].tolist() + nodes[row, path].tolist()
            full = full_logits(model, text, model.heads.chain(1))[1][-1]
            torch.testing.assert_close(scores[row, node], full, **CLOSE)
    path = tables.paths[torch.tensor([9, 0, 4])]
    keep_path(session, states, path)
    accepted = tables.depths[torch.tensor([9, 0, 4])]
    session.commit(nodes.gather(1, path).roll(-1, 1).scatter(1, accepted[:, None], nodes[:, -1:]), accepted)
    session.note_progress()


@pytest.mark.parametrize("name", some_of(NAMES, one_in=4, first=1))
def test_how_far_layers_look_back_is_measured(name):
    """transformers' own settings say the same."""
    model = model_of(name, "medusa")
    config = model.trunk.architecture.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else ""] * config.num_hidden_layers
    expected = [window if kind == "sliding_attention" else None for kind in kinds]
    assert [span.window for span in spans_of(model)] == expected


@pytest.mark.parametrize("name", RECURRENT)
def test_layers_with_a_state_take_no_drafts(name):
    model = model_of(name)
    judge = judge_of(model)
    for prompt in PROMPTS:
        assert generate(model, [prompt], max_new_tokens=LENGTH).tokens == [said_by(judge, prompt)]
    two = [PROMPTS[0], PROMPTS[0][::-1]]
    assert generate(model, two, max_new_tokens=LENGTH).tokens == [said_by(judge, prompt) for prompt in two]
    with pytest.raises(DecodingError, match="rejected drafts cannot be taken back"):
        generate(model, PROMPTS[:1], decoder="chain")
    with pytest.raises(DecodingError, match="of one length"):
        generate(model, PROMPTS)
    last_has_a_state = {"layer_types": ["full_attention", *["linear_attention"] * 3]}
    with pytest.raises(DecodingError, match="layers like number 3"):
        generate(model_of(name, "anticausal", **last_has_a_state), PROMPTS[:1], max_new_tokens=LENGTH)


@pytest.mark.parametrize("name", ["falcon_h1", "deepseek_v32", "mamba2"])
def test_what_is_kept_beside_keys_and_values_is_kept_by_transformers(name):
    """A state in the same layer, keys by which sparse attention chooses, and a state alone."""
    model = model_of(name)
    judge = judge_of(model)
    for prompt in PROMPTS[:2]:
        expected = said_by(judge, prompt)
        assert generate(model, [prompt], max_new_tokens=LENGTH).tokens == [expected]
    assert len({*expected}) > 4


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in BY_SLOT), ("falcon", {"alibi": True, "new_decoder_architecture": False})],
)
def test_attention_by_distance_takes_no_trees(name, settings):
    model = model_of(name, "medusa", **settings)
    assert generate(model, PROMPTS, max_new_tokens=8).tokens == [plain_text(model, tuple(p), 8) for p in PROMPTS]
    with pytest.raises(DecodingError, match="ALiBi"):
        generate(model, PROMPTS, decoder="tree", tree=TREE)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        pytest.param("gemma2", "sequential", {"decoder": "chain", "sample_drafts": True}, marks=pytest.mark.slow),
        pytest.param("mixtral", "parallel", {"decoder": "blockwise"}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "sequential", {"decoder": "chain"}, marks=pytest.mark.slow),
        pytest.param("gpt2", "medusa", {"decoder": "tree", "tree": TREE}, marks=pytest.mark.slow),
    ],
)
def test_sampled_texts_have_the_law_of_plain_sampling(name, kind, options):
    model = model_of(name, kind, vocab_size=4, bos_token_id=None, eos_token_id=None)
    sampling = {"temperature": 1.3, "top_k": 3}
    made = generate(model, [[1, 2]] * 4000, max_new_tokens=4, **sampling, **options)
    assert abs(deviation(made.tokens, exact_law(model, Sampling(**sampling)))) < 5
    assert 0 < made.statistics.num_accepted_tokens < made.statistics.num_draft_tokens


@pytest.mark.parametrize("name", ["gemma2", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_branches_and_layers_are_seen(name):
    """What evaluation asks: laws of tokens ahead are sums over branches; the last layer's state is the main head's."""
    model = model_of(name, "medusa", vocab_size=7, bos_token_id=None, eos_token_id=None)
    text = [1, 2, 3, 6, 5]
    session = DecodeState(model, [text[:-1]], max_drafts=0, remaining=600, seed=0)
    prefill(session)
    session.tokens[0, 4] = text[-1]
    session.note_progress()
    first, second = laws_ahead(session, 2, nucleus=1.0, most_paths=10**6)
    alone = [full_logits(model, [*text, token])[1].double().softmax(-1) for token in range(7)]
    torch.testing.assert_close(first.probabilities, alone[0][-2], **CLOSE)
    expected = torch.stack([law[-2, token] * law[-1] for token, law in enumerate(alone)]).sum(0)
    torch.testing.assert_close(second.probabilities, expected, **CLOSE)
    assert len(layer_states(model, text)) == 1 + len(model.trunk.layers)


def test_texts_stay_on_one_side_of_a_change_of_angles():
    """Keys that are kept were turned by the angles of their time; transformers reads the text anew at the change."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    settings = {"rope_parameters": factors | {"rope_theta": 1e4}, "original_max_position_embeddings": 24}
    model = model_of("phi3", "sequential", **settings)
    judge = judge_of(model)
    for prompt, room in (([5, 6, 7], 17), (PROMPTS[1] * 3, 20)):
        made = generate(model, [prompt], max_new_tokens=room)
        assert made.tokens == [said_by(judge, prompt, room)]
    for prompts, room in (([[5, 6, 7]], 18), ([[5, 6, 7], PROMPTS[1] * 3], 4)):
        with pytest.raises(DecodingError, match="angles change"):
            generate(model, prompts, max_new_tokens=room)


def test_drafts_at_the_end_of_the_context_ask_for_no_position_beyond_it():
    model = model_of("gpt2", "sequential")
    prompt = [*PROMPTS[1], *PROMPTS[1]]
    room = model.section.max_position_embeddings - len(prompt)
    assert generate(model, [prompt], max_new_tokens=room).tokens == [plain_text(model, tuple(prompt), room)]
    with pytest.raises(DecodingError, match="fit the context"):
        generate(model, [prompt], Settings(max_new_tokens=room + 1))
