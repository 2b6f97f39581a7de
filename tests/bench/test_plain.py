"""The plain loop over transformers' model trains what ours does, and is timed beside it."""

import json

import pytest
import torch

from mtp_lightning.bench.training.plain import PlainStep, measured
from mtp_lightning.bench.training.step import TrainingStep
from mtp_lightning.checkpoint.export.write import export_model
from tests.checkpoint.runs import save_run
from tests.support.runs import ROOT, mtp
from tests.support.tiny import NEOX, tiny_recipe

transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs transformers")
MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "shared keys": {"num_key_value_heads": 2},
    "neox": NEOX | {"head_dim": None, "partial_rotary_factor": 0.5},
}


def step_of(model, **batch):
    sizes = {"global_batch_size": 4, "micro_batch_size": 4} | batch
    recipe = tiny_recipe(model=MODELS[model], heads={"num_offsets": 1}, batch=sizes, optimizer={"max_grad_norm": None})
    return TrainingStep(recipe, torch.device("cpu"))


@pytest.mark.parametrize("model", MODELS)
def test_both_train_as_many_parameters(model):
    own = step_of(model)
    counts = [sum(part.numel() for part in module.parameters()) for module in (PlainStep(own).model, own.model)]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_the_same_weights_are_the_same(model, tmp_path):
    own = step_of(model, micro_batch_size=2)
    plain = PlainStep(own)
    save_run(tmp_path / "run", own.recipe, 1, model=own.model)
    export_model(tmp_path / "run", tmp_path / "out", "trunk")
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain.model.load_state_dict(stored.state_dict())
    norms = []
    for step, parameters in ((plain, plain.parameters), (own, [*own.model.parameters()])):
        step.optimizer.zero_grad = lambda **_: None
        plain.run() if step is plain else own.run("sequential", predicts=False)
        norms.append(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)


def test_micro_batches_add_up():
    found = []
    for size in (4, 2, 1):
        torch.manual_seed(0)
        plain = PlainStep(step_of("llama", micro_batch_size=size))
        plain.optimizer.zero_grad = lambda: None
        plain.run()
        found.append([parameter.grad for parameter in plain.parameters])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_pairs_are_measured_in_turn():
    figures = measured(step_of("llama"), 2)
    assert len(figures.plain_s) == len(figures.own_s) == len(figures.ratios) == 2
    assert figures.ratios[0] == figures.plain_s[0] / figures.own_s[0]


@pytest.mark.slow
def test_the_verb_says_how_many_times_as_fast(tmp_path):
    recipe = str(ROOT / "recipes/quickstart.yaml")
    fields = ("batch.micro_batch_size=8", "run.threads=1", "--pairs", "1", "--json", "figures.json")
    done = mtp("bench", "plain", recipe, *fields, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["ratio"] > 0


@pytest.mark.parametrize(
    ("field", "said", "code"),
    [
        ("optimizer.kind=muon", 'optimizer.kind must be "adamw" beside a plain loop', 2),
        ("adapt.lora={rank: 2}", "adapt.lora must be null beside a plain loop", 2),
        ("freeze=[unembedding]", "freeze must be [] beside a plain loop", 2),
        ("model.mlp=gelu", "a model beside a plain loop must be one that a family of transformers can be", 3),
    ],
)
def test_what_a_plain_loop_does_not_do_is_named(field, said, code, tmp_path):
    done = mtp("bench", "plain", str(ROOT / "recipes/quickstart.yaml"), field, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
