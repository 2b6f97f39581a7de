"""What a writer of a format is given, and what it makes: values, from which the files follow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from mtp_lightning.checkpoint.convert.merge_lora import MergedReader, plain_recipe
from mtp_lightning.checkpoint.format.carried_files import Files, files_of_model
from mtp_lightning.checkpoint.format.folder import CheckpointFolder
from mtp_lightning.checkpoint.format.manifest import DtypeName
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.checkpoint.huggingface.canonical_names import Parameter, num_base_layers, parameters_of
from mtp_lightning.checkpoint.huggingface.folder import changed
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.schema.model import ModelSection


class Refusal(NamedTuple):
    """Why a format cannot hold a model; what to do follows from the table."""

    expected: str
    found: str


@dataclass(frozen=True)
class Source:
    """A trained model on its way out. Low-rank updates are merged."""

    checkpoint: CheckpointFolder
    dtype: DtypeName
    given: WeightSource | None = None  # weights under the model's names, where a folder rounds each to its own type

    @cached_property
    def recipe(self) -> Recipe:
        """Recipe of the plain model."""
        return plain_recipe(self.checkpoint.recipe)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Every parameter, with its place in the formats of others."""
        return parameters_of(self.recipe)

    @cached_property
    def section(self) -> ModelSection:
        """The model that predicts the next token: as many layers as a token passes on its way to these scores."""
        num_layers = num_base_layers(self.parameters, self.recipe.model)
        return changed(self.recipe.model, num_hidden_layers=num_layers)

    @cached_property
    def reader(self) -> MergedReader:
        """The weights, block by block."""
        return MergedReader(self.checkpoint.reader, self.checkpoint.recipe)

    @property
    def told(self) -> dict[str, Any]:
        """What reports say of it."""
        checkpoint = self.checkpoint
        return {"folder": checkpoint.path.name, "step": checkpoint.step, "sha256": checkpoint.sha256}

    @cached_property
    def files(self) -> Files:
        """Tokenizer, chat template and settings that go with the model."""
        return files_of_model(self.recipe, self.checkpoint.path)


@dataclass(frozen=True)
class Contents:
    """One folder of a format. What stands in neither `written` nor `left_out` fails the export."""

    weights: WeightSource
    settings: Mapping[str, Any]  # config.json
    written: Mapping[str, str]  # parameters, and the tensor that each is in
    made: Mapping[str, str] = field(default_factory=dict)  # tensors that hold no parameter, and what they are for
    left_out: Mapping[str, str] = field(default_factory=dict)  # parameters, and why
    files: Files = field(default_factory=dict)  # copied byte for byte
    texts: Mapping[str, str] = field(default_factory=dict)  # further files by name, as modelling code
    notes: tuple[str, ...] = ()  # what the reader of the screen should know beside the table
    weights_file: str = WHOLE_MODEL
    of_own_type: Mapping[str, torch.dtype] = field(default_factory=dict)  # tensors that are not of the export's type
