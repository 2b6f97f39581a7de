"""A run may start from a model with more offsets: the further heads are dropped aloud, the rest is kept bit for bit."""

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.errors import CheckpointError
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.layer_counts import num_layers_from_trunk, num_trunk_layers
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT

SHORT = ("run.steps=2", "run.validate_every_steps=2", "checkpoint.every_steps=2", "logging.every_steps=1")
TRUNK_READERS = ("parallel", "medusa", "linear", "sequential", "recursive", "chained_causal")
FROZEN = ("[trunk, heads]", "[heads, unembedding]")


def run(kind, folder, cache, *overrides):
    own = ("run.threads=1", f"run.dir={folder}", f"run.cache={cache}")
    assert train(load_recipe(ROOT / f"recipes/debug/{kind}.yaml", [*SHORT, *own, *overrides])) == 0
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def layers_for(start, num_offsets):
    """How many layers a model with fewer offsets has in all."""
    heads = start.heads.model_copy(update={"num_offsets": num_offsets})
    return num_trunk_layers(start) + num_layers_from_trunk(start.model_copy(update={"heads": heads}))


@pytest.mark.parametrize("num_offsets", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [kind if kind == "medusa" else pytest.param(kind, marks=pytest.mark.slow) for kind in TRUNK_READERS],
)
def test_what_is_left_is_bit_identical(kind, num_offsets, cache, tmp_path, capfd):
    run(kind, tmp_path / "start", cache)
    recipe, model = load_model(tmp_path / "start")
    before = dict(model.named_parameters())
    kept = set()
    for number, frozen in enumerate(FROZEN):
        start = (f"init.path={tmp_path}/start", f"heads.num_offsets={num_offsets}", "objective.distill=null")
        layers = f"model.num_hidden_layers={layers_for(recipe, num_offsets)}"
        run(kind, tmp_path / str(number), cache, *start, layers, f"freeze={frozen}")
        after = dict(load_model(tmp_path / str(number))[1].named_parameters())
        assert set(after) < set(before) or (kind, num_offsets) == ("recursive", 2)
        kept |= {name for name, value in after.items() if torch.equal(value, before[name])}
        assert set(after) - kept == ({name for name in after if "unembedding" in name} if number == 0 else set())
    dropped = ", ".join(map(str, range(num_offsets + 1, 5)))
    assert f"dropped: the heads of offset {dropped}" in capfd.readouterr().out


def test_a_head_that_the_main_one_reads_is_not_dropped(cache, tmp_path):
    run("chained_anticausal", tmp_path / "start", cache)
    layers = layers_for(load_model(tmp_path / "start")[0], 1)
    more = (f"model.num_hidden_layers={layers}", "heads.num_offsets=1", f"init.path={tmp_path}/start")
    with pytest.raises(CheckpointError, match="anticausal"):
        run("chained_anticausal", tmp_path / "run", cache, *more)


def test_a_trunk_of_other_length_is_told_how_long_it_must_be(cache, tmp_path):
    run("parallel", tmp_path / "start", cache)
    layers = layers_for(load_model(tmp_path / "start")[0], 1)
    with pytest.raises(CheckpointError, match=f"layers of the trunk.*num_hidden_layers={layers}"):
        run("parallel", tmp_path / "run", cache, "heads.num_offsets=1", f"init.path={tmp_path}/start")
