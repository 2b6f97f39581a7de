"""The Python API: fit, generate and save with a Trainer of the user's own, and what such a Trainer is refused for."""

import copy
import json
import pickle
import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

import mtp_lightning
from mtp_lightning import (
    MtpDataModule,
    MtpLightningModule,
    Recipe,
    generate,
    load_model,
    load_recipe,
    recipe_callbacks,
    save_model,
)
from mtp_lightning.diagnostics.parity import TOLERANCE
from mtp_lightning.errors import CheckpointError, DecodingError, RecipeError, TrainingError
from mtp_lightning.training.fit import train
from mtp_lightning.training.step.times import PARTS
from tests.support import warm
from tests.support.ddp_fit import SLEEP_S, Watch
from tests.support.runs import ROOT, figures
from tests.support.tiny import relative_error

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning 2.6 on torch 2.13, of `self.log`
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:Checkpoint directory",
    "ignore:Using ModelCheckpoint with manual optimization",  # saves after the optimizer step, as it should
)
SHORT = ("run.steps=5", "logging.every_steps=1", "run.validate_every_steps=5", "run.threads=1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe_of(tmp_path, cache):
    def load(*overrides, name="parallel"):
        path = ROOT / f"recipes/debug/{name}.yaml"
        return load_recipe(path, [*SHORT, f"run.dir={tmp_path}/run", f"run.cache={cache}", *overrides])

    return load


def own_trainer(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": -1}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **quiet | {"enable_checkpointing": False} | options)


def fit(recipe, folder, **options):
    ckpt_path = options.pop("ckpt_path", None)
    module, trainer = MtpLightningModule(recipe), own_trainer(folder, **options)
    trainer.fit(module, datamodule=MtpDataModule(recipe), ckpt_path=ckpt_path)
    return module


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_package_is_light_and_its_names_are_there():
    code = "import sys, mtp_lightning; print(*[n for n in ('torch', 'lightning', 'pydantic') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    for name in mtp_lightning.__all__:
        assert getattr(mtp_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="'Transformer'"):
        mtp_lightning.Transformer  # noqa: B018


@pytest.mark.parametrize("name", ["parallel", pytest.param("sequential", marks=pytest.mark.slow)])
def test_one_device_gives_the_weights_of_mtp_train(recipe_of, tmp_path, name):
    loaded = recipe_of(name=name)
    assert train(loaded) == 0
    module = fit(
        loaded, tmp_path, max_steps=5, logger=CSVLogger(tmp_path, "logs")
    )  # sanity check and inference mode on
    assert_equal(weights_of(module.model), weights_of(load_model(tmp_path / "run").model))
    logged, expected = (figures(tmp_path / name) for name in ("logs/version_0/metrics.csv", "run/metrics.csv"))
    for key in ("train/loss_1", "train/loss_4", "grad_norm/all", "val/mean_acceptance_length"):
        found, wanted = ([float(row[key]) for row in rows if row[key]] for rows in (logged, expected))
        assert found == pytest.approx(wanted, rel=1e-6)
        assert len(found) == (1 if key.startswith("val") else 5)


def test_a_recipe_may_be_a_path():
    path = ROOT / "recipes/debug/parallel.yaml"
    assert MtpLightningModule(path).recipe == MtpDataModule(str(path)).recipe == load_recipe(path).recipe
    with pytest.raises(RecipeError):
        MtpLightningModule(ROOT / "recipes/nowhere.yaml")
    assert MtpLightningModule({"run": {"steps": 7}}).recipe == Recipe.model_validate({"run": {"steps": 7}})
    assert MtpLightningModule(load_recipe(path).recipe.model_dump(mode="json")).recipe == load_recipe(path).recipe


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"run": {"stepz": 7}}, "run.stepz must be a field of run; found the unknown name stepz (given in Python)"),
        ({"heads": {"num_offsets": 4}, "model": {"num_hidden_layers": 2}}, "model.num_hidden_layers must"),
        (5, "recipe must be a recipe, the path of one, or a mapping of its sections; found a int"),
    ],
)
def test_faults_of_what_is_no_recipe_are_told_in_python_too(given, told):
    with pytest.raises(RecipeError) as caught:
        MtpLightningModule(given)
    assert told in str(caught.value)


def test_a_checkpoint_of_lightning_resumes_exactly(recipe_of, tmp_path):
    loaded = recipe_of("batch.global_batch_size=8", "logging.every_steps=2")
    whole = fit(loaded, tmp_path)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    fit(loaded, tmp_path, max_steps=3, enable_checkpointing=True, callbacks=[saving])
    resumed = fit(loaded, tmp_path, ckpt_path=saving.best_model_path, enable_checkpointing=True, callbacks=[saving])
    assert_equal(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.trainer.datamodule.rows_consumed == 5 * 8
    resumed.trainer.save_checkpoint(tmp_path / "last.ckpt")
    for given in ({}, {"recipe": loaded}):
        read = MtpLightningModule.load_from_checkpoint(tmp_path / "last.ckpt", **given)
        save_model(read, tmp_path / f"saved_{len(given)}")
        assert load_model(tmp_path / f"saved_{len(given)}").recipe == whole.recipe
        assert read.recipe == resumed.recipe
        assert_equal(weights_of(read.model), weights_of(whole.model))


def test_a_module_is_copied_and_pickled_and_not_called(recipe_of, tmp_path):
    module = fit(recipe_of(), tmp_path)
    for made in (MtpLightningModule(recipe_of()), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        own_trainer(tmp_path, max_steps=5).fit(made, datamodule=MtpDataModule(made.recipe))
        assert made.step_vote.ballot() == [1, *[0] * (made.step_vote.size - 1)]
    with pytest.raises(TrainingError, match=r"mtp_lightning\.generate"):
        module(torch.zeros(1, 8, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")
@pytest.mark.parametrize("compiled", [torch.compile, lambda module: module.compile() or module])
def test_a_module_that_was_compiled_is_refused(recipe_of, tmp_path, compiled):
    loaded = recipe_of()
    with pytest.raises(TrainingError, match=r"memory\.compile=true"):
        own_trainer(tmp_path).fit(compiled(MtpLightningModule(loaded)), datamodule=MtpDataModule(loaded))


def test_a_monitored_figure_chooses_checkpoints(recipe_of, tmp_path):
    saving = ModelCheckpoint(tmp_path, monitor="val/loss_1", filename="{step}")
    loaded = recipe_of("run.steps=4")
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    module = fit(loaded, tmp_path, enable_checkpointing=True, callbacks=[saving], **options)
    assert float(saving.best_model_score) == pytest.approx(float(module.trainer.callback_metrics["val/loss_1"]))
    assert saving.best_model_path.endswith("step=4.ckpt")
    (alone,) = own_trainer(tmp_path, logger=CSVLogger(tmp_path)).validate(
        module, datamodule=MtpDataModule(loaded), verbose=False
    )
    assert alone["val/loss_1"] == pytest.approx(float(saving.best_model_score))


def run_two_ranks(recipe_file, folder, *overrides):
    code = "import runpy; runpy.run_module('tests.support.ddp_fit', run_name='__main__', alter_sys=True)"
    arguments = [str(word) for word in (recipe_file, folder, 2, *overrides)]
    done = warm.run(*arguments, cwd=ROOT, code=code, warm_ranks=True)
    assert done.returncode == 0, done.stderr[-4000:]
    tensors = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("gradients", "weights"))
    return *tensors, json.loads((folder / "facts.json").read_text())


def assert_times_show_who_is_late(metrics):
    """One rank waits for its rows, and the other for it, in the reduction that every step begins with."""
    times = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
    for part in PARTS:
        assert 0 < times[f"{part}_min_s"] <= times[f"{part}_s"] <= times[f"{part}_max_s"], part
        assert times[f"{part}_s"] == pytest.approx((times[f"{part}_min_s"] + times[f"{part}_max_s"]) / 2), part
    assert times["data_min_s"] < SLEEP_S / 2 < SLEEP_S < times["data_max_s"]
    assert times["reduce_max_s"] - times["reduce_min_s"] > SLEEP_S / 2
    assert max(times[f"{part}_max_s"] for part in ("forward", "backward", "step")) < SLEEP_S


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(
            "parallel",
            ("batch.micro_batch_size=2", "objective.backward_order=sequential"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sequential",
            ("objective.backward_order=bridged", "objective.weights={kind: constant, values: [1, 1, 0, 1]}"),
            marks=pytest.mark.slow,
        ),
        pytest.param("parallel", ("optimizer.kind=adafactor",), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_compute_what_one_computes(recipe_of, cache, tmp_path, name, changes):
    recipe = ROOT / f"recipes/debug/{name}.yaml"
    changes = (*SHORT, f"run.cache={cache}", "run.steps=3", "batch.global_batch_size=8", *changes)
    gradients, weights, facts = run_two_ranks(recipe, tmp_path, *changes)
    watch = Watch()
    alone = fit(load_recipe(recipe, changes), tmp_path, callbacks=[watch])
    for found, expected in ((gradients, watch.gradients), (weights, alone.state_dict())):
        expected = {name.removeprefix("model."): tensor for name, tensor in expected.items()}
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert relative_error(found[key], tensor) < TOLERANCE, key
    for key in ("train/loss_1", "grad_norm/all", "val/loss_1"):
        assert facts["metrics"][key] == pytest.approx(float(alone.trainer.callback_metrics[key]), rel=1e-5)
    num_entries = sum(gradient.numel() for gradient in gradients.values())
    assert_times_show_who_is_late(facts["metrics"])
    assert facts["steps"] == [{"equal_before": 0, "entries": num_entries}] * 3  # once per step, over all passes


def test_weights_to_start_from_come_by_a_callback(recipe_of, tmp_path):
    assert train(recipe_of()) == 0
    loaded = recipe_of(f"init.path={tmp_path}/run", "freeze=[offsets_below_2]", "run.steps=2")
    with pytest.raises(TrainingError, match=r"init\.path without.*recipe_callbacks"):
        fit(loaded, tmp_path)
    module = fit(loaded, tmp_path, callbacks=recipe_callbacks(loaded))
    before, after = weights_of(load_model(tmp_path / "run").model), weights_of(module.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("heads.") for name in moved)


def test_generation_from_a_module_a_folder_and_a_loaded_model(recipe_of, tmp_path):
    module = fit(recipe_of(), tmp_path)
    save_model(module, tmp_path / "saved")
    assert_equal(weights_of(load_model(tmp_path / "saved").model), weights_of(module.model))
    with pytest.raises(CheckpointError, match="new or empty"):
        save_model(module, tmp_path / "saved")
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    texts = {
        str(generate(model, "def f(", **options)) for model in (module, tmp_path / "saved", str(tmp_path / "saved"))
    }
    model = load_model(tmp_path / "saved")
    texts.add(generate(model, "def f(", **options).text)
    assert len(texts) == 1
    assert len(texts.pop()) > 0
    several = generate(model, ["def f(", "import"], max_new_tokens=7, stop=["\n"])
    assert [len(own.tokens) <= 7 for own in several] == [True, True]
    assert several[0].statistics.num_prompts == 2


@pytest.mark.parametrize("prompt", [5, b"a", [1, 2], [b"a"], {"a": 1}, None])
def test_prompts_that_are_no_texts_are_refused(recipe_of, prompt):
    module = MtpLightningModule(recipe_of())
    module.configure_model()
    with pytest.raises(DecodingError, match="a prompt must be a text, or several"):
        generate(module, prompt)


def test_what_is_no_model_here_is_refused_with_the_way_to_one(recipe_of, tmp_path):
    for use in (lambda module: generate(module, "a"), lambda module: save_model(module, tmp_path / "saved")):
        with pytest.raises(CheckpointError, match="a module before Trainer.fit"):
            use(MtpLightningModule(recipe_of()))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(CheckpointError, match="mtp import"):
        load_model(tmp_path)


def refusal(loaded, trainer):
    with pytest.raises(TrainingError) as caught:
        trainer.fit(MtpLightningModule(loaded), datamodule=MtpDataModule(loaded))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "overrides", "words"),
    [
        ({"strategy": DeepSpeedStrategy()}, (), ("DeepSpeedStrategy", "mtp train")),
        ({"strategy": ModelParallelStrategy(1, 1)}, (), ("ModelParallelStrategy", 'strategy="ddp"')),
        ({"strategy": DDPStrategy(ddp_comm_hook=fp16_compress_hook)}, (), ("fp16_compress_hook", "ddp_comm_hook")),
        ({}, ("strategy.kind=zero1", "strategy.ranks_per_node=1"), ("strategy.kind=zero1", "mtp train")),
        ({"precision": "bf16-mixed"}, (), ("bf16-mixed", "run.precision=bf16")),
        ({"precision": "64-true"}, (), ("64-true", "32-true")),
        ({"gradient_clip_val": 1.0}, (), ("gradient_clip_val=1.0", "optimizer.max_grad_norm")),
        ({"accumulate_grad_batches": 2}, (), ("accumulate_grad_batches=2", "batch.micro_batch_size")),
        ({"overfit_batches": 1}, (), ("overfit_batches=1", "data.corpus")),
        ({"max_steps": 9}, (), ("max_steps=9", "run.steps=9")),
        ({}, ("run.early_stop={}",), ("run.early_stop", "recipe_callbacks")),
        ({}, ("health.drift={}", "init.path=x"), ("init.path, health.drift", "recipe_callbacks")),
        ({}, ("debug.profile_steps=[1, 2]",), ("debug.profile_steps", "mtp train")),
        ({}, ("phases={a: {run: {steps: 2}}}",), ("phases a", "mtp train")),
    ],
)
def test_what_a_trainer_is_refused_for(recipe_of, tmp_path, options, overrides, words):
    message = refusal(recipe_of(*overrides), own_trainer(tmp_path, **options))
    assert [word for word in words if word not in message] == []


def test_other_data_and_another_recipe_are_refused(recipe_of, tmp_path):
    loaded = recipe_of()
    with pytest.raises(TrainingError, match="one of another recipe"):
        own_trainer(tmp_path).fit(MtpLightningModule(loaded), datamodule=MtpDataModule(Recipe()))
    with pytest.raises(TrainingError, match="NoneType"):
        own_trainer(tmp_path).fit(MtpLightningModule(loaded), train_dataloaders=[{}])
