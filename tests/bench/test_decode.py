"""`mtp bench decode` and `mtp bench tree`, from a checkpoint to table, JSON and picture."""

import json

import pytest
import torch
from typer.testing import CliRunner

from mtp_lightning.bench.decoding.rounds import DecodeVariant, WrittenDrafts, time_variants, ways_of
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.cli.app import app
from mtp_lightning.data.loading.factory import prepare_data
from mtp_lightning.decode import build_tree, generate
from mtp_lightning.decode.tree import choice_shares, read_tree
from tests.checkpoint.runs import save_run
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"text {number} " * 12)
    recipe = tiny_recipe(
        model={"vocab_size": 257},
        data={"corpus": [str(corpus)], "seq_len": 24, "validation_fraction": 0.2},
        run={"dir": str(folder / "run"), "cache": str(folder / "cache")},
    )
    prepare_data(recipe)
    save_run(folder / "run", recipe, step=1)
    return folder / "run"


def mtp(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments), "--device", "cpu"])


def test_table_json_and_picture(run, tmp_path):
    paths = ["--json", tmp_path / "out/figures.json", "--png", tmp_path / "out/figures.png"]
    sizes = ["--batches", "3,1", "--prompt-tokens", "8", "--new-tokens", "12", "--rounds", "2"]
    result = mtp("decode", run, *sizes, *paths)
    assert result.exit_code == 0, result.output
    for word in ("greedy", "blockwise", "adaptive", "tree", "ceiling", "efficiency", "Prefill is not in it"):
        assert word in result.stdout
    assert (tmp_path / "out/figures.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out/figures.json").read_text())
    figures = written["figures"]
    assert [figure["batch"] for figure in figures] == [1] * 7 + [3] * 7
    for figure in figures:
        check_figure(figure)
    lengths = [figure["draft_length"] for figure in figures if figure["decoder"] == "blockwise"]
    assert lengths[:5] == [1, 2, 3, "adaptive", 3]


def check_figure(figure):
    assert len(figure["decode_s"]) == 2
    assert figure["same_texts"] == 1
    assert figure["efficiency"] == pytest.approx(figure["speedup"] / figure["mean_acceptance_length"])
    kept, steps = figure["num_accepted_tokens"], figure["num_drafts"]
    assert figure["mean_acceptance_length"] == pytest.approx(1 + kept / steps)
    assert sum(figure["histogram"].values()) == steps
    assert sum(int(count) * times for count, times in figure["histogram"].items()) == kept
    assert sum(figure["num_accepted_tokens_per_pos"]) == kept
    assert figure["acceptance_rate_per_position"] == [kept / steps for kept in figure["num_accepted_tokens_per_pos"]]
    if figure["is_ceiling"]:
        assert figure["mean_acceptance_length"] == 4
        assert figure["acceptance_rate_per_position"] == [1, 1, 1]
    if figure["decoder"] == "greedy":
        assert figure["speedup"] == figure["mean_acceptance_length"] == 1
        assert figure["num_draft_tokens"] == 0


def test_prompts_come_from_a_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo two\n")
    sizes = ["--batches", "3", "--new-tokens", "4", "--rounds", "1"]
    result = mtp("decode", run, "--prompts", tmp_path / "prompts.txt", *sizes)
    assert result.exit_code == 0, result.output
    assert "tree" not in result.stdout  # nothing to measure choices on


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_way_that_fits_is_measured(kind):
    model = tiny_model(tiny_recipe(heads=HEAD_KINDS[kind]))
    ways = ways_of(model, build_tree([[0.5]], 1))
    reads_tokens, is_chained = kind.startswith(("sequential", "recursive")), "causal" in kind
    expected = {"greedy", "chain"} if reads_tokens else {"greedy", "blockwise", "tree"}
    expected |= {"chain"} if is_chained else set()
    assert {way.decoder for way in ways} == expected
    assert len(ways) == len(set(ways))


def test_a_model_that_drafts_nothing_is_measured_alone():
    model = tiny_model(tiny_recipe(heads={"num_offsets": 1}))
    assert ways_of(model, None) == [DecodeVariant("greedy", None)]
    timings = time_variants(model, [[1, 2]], None, [1], new_tokens=3, rounds=1)
    assert [len(timing.decode_s) for timing in timings.values()] == [1]


def test_written_drafts_are_the_plain_text():
    model = tiny_model(tiny_recipe())
    prompts = [[1, 2], [3, 4, 5]]
    plain = generate(model, prompts, max_new_tokens=9, decoder="greedy")
    drafts = WrittenDrafts(prompts, plain, torch.device("cpu"))(torch.tensor([2, 5]), 3)
    assert drafts.tolist() == [plain.tokens[0][1:4], plain.tokens[1][3:6]]


def test_tree_is_measured_written_and_used(run, tmp_path):
    path = tmp_path / "tree.json"
    result = mtp("tree", run, "--out", path, "--drafts", "6")
    assert result.exit_code == 0, result.output
    assert "The tree has 6 drafts" in " ".join(result.stdout.split())
    tree = read_tree(path)
    assert tree.num_drafts == 6
    _, model = load_model(run)
    prompts = [[10, 20, 30]]
    assert (
        generate(model, prompts, max_new_tokens=9, decoder="tree", tree=tree).tokens
        == generate(model, prompts, max_new_tokens=9, decoder="greedy").tokens
    )


def test_shares_are_those_counted_position_by_position():
    recipe = tiny_recipe()
    model = tiny_model(recipe)
    tokens = torch.randint(13, (3, 9 + 4), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros_like(tokens)
    shares = choice_shares(model, tokens, documents, 3)
    states = model.hidden_states(tokens, documents)
    scores = {offset: model.unembedding.logits(offset, state) for offset, state in states.items()}
    for offset in (2, 3, 4):
        for rank in range(3):
            hits = []
            for row in range(3):
                for place in range(9 - offset + 1):
                    spoken = int(scores[1][row, place + offset - 1].argmax())
                    order = scores[offset][row, place].argsort(descending=True).tolist()
                    hits.append(order[rank] == spoken)
            assert shares[offset - 2][rank] == pytest.approx(sum(hits) / len(hits))


def test_heads_that_read_tokens_have_no_tree(tmp_path):
    save_run(tmp_path, tiny_recipe(heads={"kind": "sequential"}, run={"dir": str(tmp_path)}), step=1)
    result = mtp("tree", tmp_path, "--out", tmp_path / "tree.json")
    assert result.exit_code == 7
    assert "decoder tree must fit the model's heads" in result.stderr


@pytest.mark.parametrize("sizes", ["0", "1,x", ""])
def test_wrong_batches_are_wrong_usage(run, sizes):
    result = mtp("decode", run, "--batches", sizes)
    assert result.exit_code == 2
    assert "--batches" in result.stderr
