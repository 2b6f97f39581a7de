"""Muon and averages of weights: equal to torch's own, resumed to the bit, read by every verb."""

import json
import shutil
from hashlib import sha256

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.cli.app import app
from mtp_lightning.diagnostics.parity import RandomData
from mtp_lightning.diagnostics.plain_loop import plain_step
from mtp_lightning.errors import CheckpointError, TrainingError
from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.hidden_matrices import hidden_matrices
from mtp_lightning.model.mtp_model import build_model
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.learning_rate import learning_rate
from mtp_lightning.training.fit import train
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.step.muon import MuonWithAdamW
from mtp_lightning.training.step.optimizer import build_optimizer, parameter_groups, set_learning_rate
from mtp_lightning.training.strategies.device import prepare_device
from mtp_lightning.training.strategies.zero import build_strategy
from tests.support.averages import assert_average_of_steps
from tests.support.covering import some_of
from tests.support.runs import ROOT
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe

STEPS = 11
LAST = f"checkpoints/step-{STEPS:08d}"
NEW = ("optimizer.kind=muon", "optimizer.schedule=wsd", "optimizer.ema={decay: 0.8, every_steps: 2, from_step: 3}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def run(folder):
    def start(name, *overrides):
        defaults = (
            f"run.steps={STEPS}",
            "run.validate_every_steps=5",
            "checkpoint.every_steps=1",
            "checkpoint.keep=20",
        )
        places = (f"run.dir={folder / name}", f"run.cache={folder / 'cache'}", "run.threads=1")
        assert train(load_recipe(ROOT / "recipes/debug/parallel.yaml", [*defaults, *places, *overrides])) == 0
        return folder / name

    return start


@pytest.fixture(scope="module")
def averaged(run):
    return run("averaged", *NEW)


@pytest.mark.slow
def test_a_run_cut_off_goes_on_to_the_bit(averaged, run):
    again = averaged.with_name("again")
    shutil.copytree(averaged, again)
    for step in range(7, STEPS + 1):
        shutil.rmtree(again / f"checkpoints/step-{step:08d}")
    run("again", *NEW)
    files = sorted((averaged / LAST).glob("*-00001-of-00001.safetensors"))
    assert len(files) == 2
    for file in files:
        assert sha256((again / LAST / file.name).read_bytes()).digest() == sha256(file.read_bytes()).digest()


FACTORED = (
    *("optimizer.kind=adafactor", "optimizer.lr=1e-2", "optimizer.ema={decay: 0.8}"),
    "freeze=[offsets_below_2]",
)


def test_adafactor_cut_off_goes_on_to_the_bit(run):
    """Its rows and columns are stored in shapes of their own."""
    whole = run("factored", *FACTORED, "run.steps=5")
    again = whole.with_name("factored_again")
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints/step-00000005")
    run("factored_again", *FACTORED, "run.steps=5")
    reader = ShardReader(whole / "checkpoints/step-00000005")
    names = [name for name in reader.names if len(reader.shape(name)) == 2 and "row_var" in reader.kinds(name)]
    assert names
    for name in names:
        rows, columns = reader.shape(name)
        assert (reader.shape_of(name, "row_var"), reader.shape_of(name, "col_var")) == ((rows, 1), (1, columns))
    for file in (whole / "checkpoints/step-00000005").glob("*-00001-of-00001.safetensors"):
        assert (again / "checkpoints/step-00000005" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_adafactor_trains_as_torchs_own_in_a_plain_loop():
    """Rates by schedule and role, decay by role, clipped gradients, a frozen trunk's part."""
    recipe = tiny_recipe(
        heads={**HEAD_KINDS["parallel"]},
        freeze=["unembedding"],
        batch={"global_batch_size": 4, "micro_batch_size": 2},
        optimizer={
            "kind": "adafactor",
            "lr": 0.05,
            "warmup_steps": 2,
            "max_grad_norm": 0.5,
            "weight_decay": 0.2,
            "decay_scale": {"heads": 0.5},
            "lr_scale": {"heads": 2.0},
            "adafactor": {"beta2_decay": -0.7, "clip_threshold": 1.5, "eps_weight": 1e-2},
        },
        run={"steps": 6, "device": "cpu", "threads": 1},
        logging={"every_steps": 1},
    )
    module = MtpLightningModule(recipe)
    device = prepare_device(recipe)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=build_strategy(recipe, device),
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=RandomData(recipe, Ranks()))

    model = build_model(recipe)
    freeze(model, recipe)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {
            "params": [p for name, p in named.items() if name.startswith(role) and (p.dim() > 1) == is_matrix],
            "weight_decay": decay if is_matrix else 0.0,
            "factor": factor,
        }
        for role, decay, factor in (("trunk", 0.2, 1.0), ("heads", 0.1, 2.0))
        for is_matrix in (True, False)
    ]
    assert sum(len(group["params"]) for group in groups) == len(named)
    optimizer = torch.optim.Adafactor(groups, beta2_decay=-0.7, d=1.5, eps=(None, 1e-2))
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(recipe.optimizer, step, 6)
        plain_step(model, optimizer, recipe, step)
    start = dict(build_model(recipe).named_parameters())
    for name, p in module.model.named_parameters():
        expected = model.get_parameter(name)
        assert (p - expected).norm() <= 1e-6 * expected.norm(), name
        assert torch.equal(expected, start[name]) == (name not in named)


def test_the_average_is_that_of_torch(averaged):
    assert_average_of_steps(averaged, range(4, STEPS + 1, 2), decay=0.8)
    first = ShardReader(averaged / "checkpoints/step-00000003")
    assert "average" not in first.kinds(first.names[0])


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_verb_takes_the_average(averaged, tmp_path):
    last = ShardReader(averaged / LAST)
    for option, kind in (("ema", "average"), ("trained", "weight")):
        done = invoke("export", averaged, "--out", tmp_path / option, "--weights", option)
        assert done.exit_code == 0, done.output
        exported = load_file(tmp_path / option / "model.safetensors")
        assert all(torch.equal(exported[name].view(-1), last.read(name, kind)) for name in last.names)
    asked = [
        invoke("eval", "acceptance", path, "--rows", 8, *option).output
        for path, option in ((averaged, ["--weights", "ema"]), (tmp_path / "ema", []), (averaged, []))
    ]
    assert asked[0] == asked[1] != asked[2]
    asked = []
    for path, option in ((averaged, "ema"), (tmp_path / "ema", "trained"), (averaged, "trained")):
        where = tmp_path / "marginal.json"
        done = invoke("eval", "marginal", path, "--samples", 2, "--last", 4, "--weights", option, "--json", where)
        assert done.exit_code == 0, done.output
        asked.append(json.loads(where.read_text())["offsets"])
        assert (averaged / "marginal.json").exists() == (len(asked) == 3), "kept of the trained weights alone"
    assert asked[0] == asked[1] != asked[2]
    assert invoke("generate", averaged, "--prompt", "def ", "--max-new-tokens", 4, "--weights", "ema").exit_code == 0


def test_no_average_is_said(averaged, tmp_path):
    for path in (averaged / "checkpoints/step-00000002", ROOT / "recipes"):
        done = invoke("export", path, "--out", tmp_path / "none", "--weights", "ema")
        assert done.exit_code == CheckpointError.exit_code
    assert "no average of the weights in" in invoke(
        "generate", averaged / "checkpoints/step-00000002", "--prompt", "a", "--weights", "ema"
    ).stderr.replace("\n", " ")


def test_a_new_run_takes_the_state_of_its_own_optimizer_only(averaged, run):
    with pytest.raises(CheckpointError, match="init.optimizer"):
        run("other", f"init.path={averaged}", "init.optimizer=true")
    on = run("on", *NEW, f"init.path={averaged}", "init.optimizer=true", "optimizer.ema.from_step=5", "run.steps=6")
    first = ShardReader(on / "checkpoints/step-00000001")
    before = ShardReader(averaged / LAST)
    assert all(torch.equal(first.read(name, "average"), before.read(name, "average")) for name in first.names)


@pytest.mark.parametrize("name", some_of(HEAD_KINDS, one_in=3))
def test_muon_steps_hidden_matrices_as_torch_does_and_adamw_the_rest(name):
    """Under a learning rate of each role that changes, to the bit."""
    recipe = tiny_recipe(heads={**HEAD_KINDS[name]}, optimizer={"kind": "muon", "lr_scale": {"trunk": 0.5}})
    section = recipe.optimizer
    ours, theirs = tiny_model(recipe, torch.float32), tiny_model(recipe, torch.float32)
    optimizer = build_optimizer(ours, section)
    assert isinstance(optimizer, MuonWithAdamW)
    names = hidden_matrices(theirs)
    assert names == {
        name
        for name, p in theirs.named_parameters()
        if p.dim() == 2 and name.startswith(("trunk.layers.", "heads.")) and "embed" not in name
    }
    groups = parameter_groups(theirs, section, names)
    muon = torch.optim.Muon([g for g in groups if g["is_muon"]], adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([g for g in groups if not g["is_muon"]], betas=(0.9, 0.95), eps=1e-8, fused=True)
    generator = torch.Generator().manual_seed(0)
    for lr in (1e-2, 5e-3, 2e-3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for each in (optimizer, muon, adamw):
            set_learning_rate(each, section, lr)
            each.step()
    for (which, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), which
        assert ("momentum_buffer" in optimizer.state[a]) == (which in names)


def test_state_goes_through_a_file(tmp_path):
    """As a Trainer of the user's own saves it."""
    recipe = tiny_recipe(optimizer={"kind": "muon"})
    first, second = tiny_model(recipe, torch.float32), tiny_model(recipe, torch.float32)
    a, b = build_optimizer(first, recipe.optimizer), build_optimizer(second, recipe.optimizer)
    for model, optimizer, num_steps in ((first, a, 2), (second, b, 1)):
        for _ in range(num_steps):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        if optimizer is a:
            torch.save((first.state_dict(), a.state_dict()), tmp_path / "state.pt")
            weights, state = torch.load(tmp_path / "state.pt")
    second.load_state_dict(weights)
    b.load_state_dict(state)
    for model, optimizer in ((first, a), (second, b)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_weight_decay_by_role():
    section = tiny_recipe(optimizer={"decay_scale": {"unembedding": 0.0, "heads": 0.5}}).optimizer
    groups = parameter_groups(tiny_model(tiny_recipe()), section)
    decays = {(group["role"], group["weight_decay"]) for group in groups}
    assert decays == {("trunk", 0.1), ("trunk", 0.0), ("heads", 0.05), ("heads", 0.0), ("unembedding", 0.0)}
    with pytest.raises(TrainingError, match="decay_scale may name roles"):
        build_optimizer(tiny_model(tiny_recipe()), tiny_recipe(optimizer={"decay_scale": {"lora": 2.0}}).optimizer)


def test_muon_without_matrices_is_refused():
    recipe = tiny_recipe(heads={"kind": "parallel"}, optimizer={"kind": "muon"})
    model = tiny_model(recipe)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("unembedding"))
    with pytest.raises(TrainingError, match="needs matrices of layers to train"):
        build_optimizer(model, recipe.optimizer)
