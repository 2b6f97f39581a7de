"""The measured step is the step of training."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from mtp_lightning.bench.training.step import TrainingStep
from mtp_lightning.errors import NonFiniteError
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.strategies.single import SingleStrategy
from tests.bench.shapes import quick_recipe


class OneBatch(L.LightningDataModule):
    """Hands out one batch."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def train_dataloader(self):
        return DataLoader([self.batch], batch_size=None)

    def advance(self, rows):
        assert rows == len(self.batch["tokens"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader..*")
def test_it_moves_the_weights_as_the_lightning_module_does(precision, tmp_path):
    recipe = quick_recipe(num_offsets=3)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"precision": precision})})
    step = TrainingStep(recipe, torch.device("cpu"))
    module = MtpLightningModule(recipe)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=SingleStrategy(device="cpu"),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=OneBatch({"tokens": step.tokens, "documents": step.documents}))
    before = {name: parameter.clone() for name, parameter in step.model.named_parameters()}
    step.run("sequential", predicts=False)
    trained = dict(module.model.named_parameters())
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert not torch.equal(parameter, before[name]), name


def test_gradients_are_gone_afterwards():
    step = TrainingStep(quick_recipe(num_offsets=2), torch.device("cpu"))
    step.run("bridged", predicts=True)
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_a_model_that_diverges_is_no_measurement():
    step = TrainingStep(quick_recipe(num_offsets=2), torch.device("cpu"))
    with torch.no_grad():
        step.model.unembedding.lm_heads[0].weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError):
        step.run("sequential", predicts=False)
