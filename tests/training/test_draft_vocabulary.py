"""A run chooses its draft vocabulary when it begins; checkpoints, exports, extensions and later runs keep it."""

import json

import lightning as L
import pytest

from mtp_lightning.checkpoint.convert.add_heads import extend_checkpoint
from mtp_lightning.checkpoint.convert.consolidate import consolidate
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.errors import RecipeError, RunFolderError
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.draft_vocabulary import unpacked_ids
from mtp_lightning.training.fit import train
from mtp_lightning.training.lightning_module import MtpLightningModule
from tests.support.runs import figures

RECIPE = """
model: {hidden_size: 16, num_hidden_layers: 6, num_attention_heads: 2, intermediate_size: 32}
heads: {num_offsets: 3, kind: sequential, draft_vocabulary: 40}
data: {corpus: ["stdlib:json"], seq_len: 16, validation_fraction: 0.2}
batch: {global_batch_size: 2, micro_batch_size: 2}
optimizer: {warmup_steps: 1}
run: {steps: 2, validate_every_steps: 2, validation_samples: 16, device: cpu, threads: 1}
checkpoint: {every_steps: 2}
logging: {every_steps: 1}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("drafts")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert train(recipe_in(folder)) == 0
    return folder


def recipe_in(folder, *overrides, run="run"):
    return load_recipe(folder / "recipe.yaml", [f"run.dir={folder / run}", f"run.cache={folder / 'cache'}", *overrides])


def ids_of(path):
    return unpacked_ids(load_recipe(path / "recipe.yaml").recipe.heads.draft_token_ids)


def test_a_run_keeps_its_ids_on_other_data(trained):
    ids = ids_of(trained / "run")
    assert len(ids) == 40
    recipe, model = load_model(trained / "run")
    assert model.unembedding.drafts.size == 40
    rows = figures(trained / "run" / "metrics.csv")
    assert 0 < float(rows[-1]["val/outside_draft_vocabulary_2"]) < 1
    assert 0 <= float(rows[-1]["train/outside_draft_vocabulary_3"]) < 1
    other = json.dumps(["stdlib:email"])
    assert train(recipe_in(trained, f"data.corpus={other}", f"init.path={trained / 'run'}", run="next")) == 0
    assert ids_of(trained / "next") == ids
    assert train(recipe_in(trained, "run.steps=3", f"heads.draft_token_ids={recipe.heads.draft_token_ids}")) == 0
    assert train(recipe_in(trained, "run.steps=4")) == 0, "resumed"
    assert ids_of(trained / "run") == ids


def test_another_number_is_refused_for_a_run_and_chosen_anew_from_its_weights(trained):
    with pytest.raises(RunFolderError, match="heads.draft_vocabulary: 40 -> 41") as caught:
        train(recipe_in(trained, "run.steps=9", "heads.draft_vocabulary=41"))
    assert "draft_token_ids" not in str(caught.value)
    with pytest.raises(RunFolderError, match="heads.draft_vocabulary: 40 -> null"):
        train(recipe_in(trained, "run.steps=9", "heads.draft_vocabulary=null"))
    started = recipe_in(trained, f"init.path={trained / 'run'}", "heads.draft_vocabulary=50", run="wider")
    assert train(started) == 0
    assert len(ids_of(trained / "wider")) == 50


def test_a_model_without_one_gets_one(trained):
    assert train(recipe_in(trained, "heads.draft_vocabulary=null", run="plain")) == 0
    assert train(recipe_in(trained, f"init.path={trained / 'plain'}", "freeze=[trunk,unembedding]", run="gets")) == 0
    assert len(ids_of(trained / "gets")) == 40


def test_exports_and_extensions_keep_it(trained, tmp_path):
    consolidate(trained / "run", tmp_path / "whole")
    extend_checkpoint(trained / "run", tmp_path / "longer", 5)
    for folder in ("whole", "longer"):
        assert ids_of(tmp_path / folder) == ids_of(trained / "run")
        recipe, model = load_model(tmp_path / folder)
        assert model.unembedding.num_drafted == 40 < recipe.model.vocab_size


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13
def test_a_trainer_of_the_users_own_chooses_too(trained):
    recipe = recipe_in(trained).recipe
    module = MtpLightningModule(recipe)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=MtpDataModule(recipe))
    assert (
        module.recipe.heads.draft_token_ids == load_recipe(trained / "run" / "recipe.yaml").recipe.heads.draft_token_ids
    )


def test_a_model_is_not_built_without_the_ids(trained):
    with pytest.raises(RecipeError) as caught:
        MtpModel(recipe_in(trained).recipe)
    assert "before a model is built" in caught.value.faults[0].expected


def test_phases_keep_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        RECIPE + "phases: {a: {objective: {z_loss: 0.1}}, b: {data: {corpus: ['stdlib:email']}}}\n"
    )
    assert train(recipe_in(tmp_path)) == 0
    first, second = sorted((tmp_path / "run" / "phases").iterdir())
    assert ids_of(first) == ids_of(second)
    assert train(recipe_in(tmp_path)) == 0, "finished phases are compared"
