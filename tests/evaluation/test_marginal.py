"""`mtp eval marginal` and `mtp eval lens` on a small trained model, against whole forwards."""

import json

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.errors import DataError, DecodingError
from mtp_lightning.evaluation.lens import layer_states, measure_lens
from mtp_lightning.evaluation.marginal import held_out_texts, measure_marginal
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT, mtp

RUN = ("run.steps=30", "run.validate_every_steps=30", "logging.every_steps=30", "run.threads=1", "optimizer.lr=1e-2")


@pytest.fixture(scope="module", params=["sequential", pytest.param("parallel", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    own = (f"run.dir={folder / 'run'}", f"run.cache={folder / 'cache'}")
    assert train(load_recipe(ROOT / f"recipes/debug/{request.param}.yaml", [*RUN, *own])) == 0
    return folder / "run"


def test_heads_and_marginals_are_those_of_whole_forwards(run):
    report = measure_marginal(run, num_samples=2, last_tokens=4, nucleus=1.0, most_paths=10**6)
    recipe, model = load_model(run)
    hits = torch.zeros(2, 2, dtype=torch.int64)  # marginal and head, top-5, at offsets 1 and 2
    counts = [0, 0]
    for text in held_out_texts(recipe, 2, 12):
        scores = whole_scores(model, [text])
        for place in range(len(text) - 5, len(text) - 1):
            law = scores[1][0, place].double().softmax(-1)
            branches = [[*text[: place + 1], token] for token in range(257)]
            second = law @ whole_scores(model, branches)[1][:, -1].double().softmax(-1)
            for k, probabilities in enumerate((law, second)[: len(text) - 1 - place]):
                target = text[place + k + 1]
                hits[0, k] += target in probabilities.topk(5).indices
                hits[1, k] += target in scores[k + 1][0, place].topk(5).indices
                counts[k] += 1
    found = [[row.marginal_top for row in report.offsets], [row.head_top for row in report.offsets]]
    expected = hits.double() / torch.tensor(counts)
    assert found == expected.tolist()
    assert report.num_positions == counts[0] == 8
    assert 0 < expected[0, 1] < 1


@torch.no_grad()
def whole_scores(model, texts):
    tokens = torch.tensor([text + [0] * model.num_offsets for text in texts])
    states = model.hidden_states(tokens, torch.zeros_like(tokens))
    return {offset: model.unembedding.logits(offset, state) for offset, state in states.items()}


def test_the_last_layer_is_the_model_and_the_first_the_embedding(run):
    report = measure_lens(run, num_samples=4)
    recipe, model = load_model(run)
    layers = {"parallel": 2 + 1, "sequential": 3}[recipe.heads.kind]
    assert [round(layer.depth * layers) for layer in report.layers] == list(range(layers + 1))
    assert (report.layers[-1].kl, report.layers[-1].agreement) == (0, 1)
    assert all(layer.kl > 0 for layer in report.layers[:-1])
    text = held_out_texts(recipe, 1, 8)[0]
    tokens = torch.tensor([text + [0] * 4])
    (first, *_, last) = layer_states(model, text)
    assert torch.equal(first, model.trunk.embed_tokens(tokens[:, : len(text)]))
    assert torch.equal(last, model.hidden_states(tokens, torch.zeros_like(tokens))[1])


def test_the_verbs(run, tmp_path):
    done = mtp("eval", "marginal", str(run), "--samples", "2", "--last", "4", "--json", "m.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 positions at the ends of 2 held-out texts" in done.stdout
    assert len(json.loads((tmp_path / "m.json").read_text())["offsets"]) == 2
    seen = mtp("eval", "lens", str(run), "--plot", "lens.png", "--json", "lens.json", cwd=tmp_path)
    assert seen.returncode == 0, seen.stderr
    assert (tmp_path / "lens.png").stat().st_size > 10_000
    assert "100.0%" in seen.stdout


def test_what_makes_no_sense_is_refused(run):
    with pytest.raises(DataError, match="must hold 4008 tokens of one document"):
        measure_marginal(run, last_tokens=4000)
    for wrong in ({"num_offsets": 1}, {"nucleus": 0.0}, {"top": 0}, {"most_paths": 0}):
        with pytest.raises(DecodingError):
            measure_marginal(run, **wrong)
