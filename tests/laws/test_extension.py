"""Law 12: looped extension copies a group of heads exactly and leaves all that was trained as it was, bit for bit."""

import json

import pytest
import torch

from mtp_lightning.checkpoint.convert.add_heads import extend_checkpoint
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.errors import CheckpointError, RecipeError, TrainingError
from mtp_lightning.model.add_heads import parameter_origins
from mtp_lightning.model.freezing import freeze, parameters_of
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.add_heads import extended_recipe
from mtp_lightning.training import lightning_module
from mtp_lightning.training.fit import train
from tests.laws.test_schedules_agree import TOLERANCE
from tests.support.covering import every_pair
from tests.support.runs import ROOT, mtp
from tests.support.tiny import HEAD_KINDS, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows

CHAINING = ("causal", "sequential", "sequential_pre_norm", "recursive")
SHORT = ("run.steps=4", "run.validate_every_steps=4", "checkpoint.every_steps=4", "logging.every_steps=1")


def debug_run(kind, folder, cache, *overrides):
    path = ROOT / f"recipes/debug/{kind}.yaml"
    own = ("run.threads=1", f"run.dir={folder}", f"run.cache={cache}")
    assert train(load_recipe(path, [*SHORT, *own, *overrides])) == 0
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    return debug_run("sequential", tmp_path_factory.mktemp("runs") / "trained", cache, "objective.distill={}")


def weights_of(folder):
    return dict(load_model(folder)[1].named_parameters())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].view(torch.int32), value.view(torch.int32)), name


def test_by_no_heads_it_is_the_identity(trained, tmp_path):
    extend_checkpoint(trained, tmp_path / "same", 4, train_free=True)
    assert_same(weights_of(tmp_path / "same"), weights_of(trained))
    assert load_recipe(tmp_path / "same/recipe.yaml").recipe == load_recipe(trained / "recipe.yaml").recipe


def test_the_new_group_is_an_exact_copy_and_so_is_everything_old(trained, tmp_path):
    extend_checkpoint(trained, tmp_path / "more", 9, group=2)
    old, new = weights_of(trained), weights_of(tmp_path / "more")
    assert_same({name: new[name] for name in old}, old)
    copies = {4: 2, 5: 3, 6: 2, 7: 3, 8: 2}  # blocks and norms count offsets from 2: their number is offset - 2
    expected = {}
    for offset, source in ((offset + 1, source + 1) for offset, source in copies.items()):
        for name, value in old.items():
            if name.startswith(f"heads.blocks.{source - 2}."):
                expected[name.replace(f".{source - 2}.", f".{offset - 2}.", 1)] = value
        expected[f"unembedding.norms.{offset - 1}.weight"] = old[f"unembedding.norms.{source - 1}.weight"]
    assert_same({name: value for name, value in new.items() if name not in old}, expected)
    config = json.loads((tmp_path / "more/config.json").read_text())
    assert (config["num_offsets"], config["layers"]["heads"], config["step"]) == (9, 8, 4)


@pytest.mark.parametrize("backward_order", ["sequential", "bridged"])
def test_training_the_new_group_leaves_the_rest_bit_identical(trained, tmp_path, cache, backward_order):
    extend_checkpoint(trained, tmp_path / "more", 6)
    started = weights_of(tmp_path / "more")
    recipe = load_recipe(tmp_path / "more/recipe.yaml", [f"objective.backward_order={backward_order}"])
    assert train(recipe) == 0
    after = weights_of(recipe.recipe.run.dir)
    moved = {name for name, value in after.items() if not torch.equal(value, started[name])}
    fresh = {f"unembedding.norms.{k - 1}.weight" for k in (5, 6)}
    fresh |= {name for name in started if name.startswith(("heads.blocks.3.", "heads.blocks.4."))}
    assert moved == fresh
    optimizer = set()
    for path in (tmp_path / recipe.recipe.run.dir).rglob("optimizer-*.safetensors"):
        header = path.read_bytes()
        optimizer |= {name for name in started if f"exp_avg/{name}".encode() in header}
    assert optimizer == fresh


def test_a_run_that_was_extended_and_killed_goes_on_from_its_own_checkpoint(trained, tmp_path):
    extend_checkpoint(trained, tmp_path / "more", 5)
    assert train(load_recipe(tmp_path / "more/recipe.yaml")) == 0
    once = weights_of(f"{trained}-n5")
    (tmp_path / "more/model.safetensors").unlink()  # not read again
    assert train(load_recipe(tmp_path / "more/recipe.yaml", ["run.steps=6"])) == 0
    assert any(not torch.equal(value, once[name]) for name, value in weights_of(f"{trained}-n5").items())


def test_twice_extended(trained, tmp_path):
    extend_checkpoint(trained, tmp_path / "a", 6, train_free=True)
    extend_checkpoint(tmp_path / "a", tmp_path / "b", 9, group=3, train_free=True)
    extend_checkpoint(trained, tmp_path / "c", 7, train_free=True)
    assert_same(
        {name: value for name, value in weights_of(tmp_path / "b").items() if ".blocks.0." in name},
        {name: value for name, value in weights_of(trained).items() if ".blocks.0." in name},
    )
    b, c = weights_of(tmp_path / "b"), weights_of(tmp_path / "c")
    assert torch.equal(b["heads.blocks.4.eh_proj.weight"], c["heads.blocks.4.eh_proj.weight"])


@pytest.mark.parametrize("kind", CHAINING)
@pytest.mark.parametrize("matched", [True, False])
def test_origins_have_the_shapes_of_what_they_become(kind, matched):
    heads = HEAD_KINDS[kind] | {"num_offsets": 3, "layers_from_trunk": matched}
    recipe = tiny_recipe(heads=heads, data={"seq_len": 16}, objective={"distill": {"beta": [0.5, 0.25]}})
    extended = extended_recipe(recipe, 7, 2)
    assert extended.objective.distill.beta == [0.5, 0.25] * 3
    old, new = (dict(tiny_model(r).named_parameters()) for r in (recipe, extended))
    origins = parameter_origins(recipe, extended, 2)
    assert origins.keys() == new.keys()
    assert all(origins[name] == name for name in old)
    assert all(old[origin].shape == new[name].shape for name, origin in origins.items())
    assert (set(origins) == set(old)) == (kind == "recursive")


@pytest.mark.parametrize("kind", ["parallel", "linear", "medusa", "anticausal"])
def test_kinds_that_do_not_chain_are_refused(kind):
    with pytest.raises(CheckpointError, match="where each reads the one before"):
        extended_recipe(tiny_recipe(heads=HEAD_KINDS[kind]), 8, 3)


def test_what_cannot_be_extended_is_refused(trained, tmp_path):
    recipe = load_recipe(trained / "recipe.yaml").recipe
    for num_offsets, group, message in (
        (3, 1, "as before, or more"),
        (8, 4, "a group of 4, with 3"),
        (8, 0, "a group of 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            extended_recipe(recipe, num_offsets, group)
    with pytest.raises(RecipeError) as caught:
        extended_recipe(recipe, recipe.data.seq_len, 3)
    assert [fault.path for fault in caught.value.faults] == ["data.seq_len"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(CheckpointError, match="new or empty"):
        extend_checkpoint(trained, tmp_path / "out", 8)


def test_a_manifest_that_disagrees_is_refused(trained, tmp_path):
    extend_checkpoint(trained, tmp_path / "more", 5, train_free=True)
    path = tmp_path / "more/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"layers": {"trunk": 7, "heads": 4}}))
    with pytest.raises(CheckpointError, match="must agree on the offsets and the layers"):
        extend_checkpoint(tmp_path / "more", tmp_path / "again", 6)


def test_a_start_from_another_model_is_refused(trained, tmp_path, cache):
    start = f"init.path={trained}"
    with pytest.raises(CheckpointError, match="of another shape"):
        debug_run("sequential", tmp_path / "wider", cache, start, "model.intermediate_size=80")
    with pytest.raises(CheckpointError, match="pre_norm here"):
        debug_run("sequential", tmp_path / "other", cache, start, "heads.hidden=pre_norm")
    with pytest.raises(CheckpointError, match="layers of the trunk 3 there and 2 here"):
        debug_run("sequential", tmp_path / "fewer", cache, start, "model.num_hidden_layers=5")


@every_pair(
    kind=[kind for kind in HEAD_KINDS if kind != "anticausal"],
    backward_order=["sequential", "bridged"],
    is_distilled=[False, True],
    full=True,
)
def test_frozen_parts_get_no_gradient_and_the_others_the_same(kind, backward_order, is_distilled):
    """Gradients of what trains are those of the whole step, in which the losses of frozen offsets have no weight."""
    objective = {"distill": {"top_k": 5}} if is_distilled else {}
    first = 2 if kind == "recursive" else 3
    weights = [0.0] * (first - 1) + [1.0] * (5 - first)
    results = []
    for own, is_frozen in ((backward_order, True), ("joint", True), ("joint", False)):
        frozen = [f"offsets_below_{first}"] if is_frozen else []
        recipe = tiny_recipe(heads=HEAD_KINDS[kind], freeze=frozen, objective={"backward_order": own} | objective)
        model = tiny_model(recipe)
        freeze(model, recipe)
        results.append(gradients_of(model, recipe, tiny_rows(recipe, 2), weights))
    (losses, found), (expected_losses, expected), (_, whole) = results
    torch.testing.assert_close(losses[0].nll_sums, expected_losses[0].nll_sums, equal_nan=True)
    assert found.keys() == expected.keys()
    assert 0 < len(found) < len(whole)
    served = {id(p) for offset in range(1, first) for p in (*parameters_of(model, offset), *model.trunk.parameters())}
    assert not any(id(parameter) in served for name, parameter in model.named_parameters() if name in found)
    errors = [relative_error(found[name], reference[name]) for name in found for reference in (expected, whole)]
    assert max(errors) <= TOLERANCE


def test_a_frozen_parameter_that_changes_stops_the_run_before_its_last_checkpoint(trained, tmp_path, monkeypatch):
    extend_checkpoint(trained, tmp_path / "more", 5)
    clip = lightning_module.clip_gradients

    def disturb(parameters, *rest):
        parameters = list(parameters)
        with torch.no_grad():
            parameters[0][0, 0] += 1e-3
        clip(parameters, *rest)

    monkeypatch.setattr(lightning_module, "clip_gradients", disturb)
    with pytest.raises(TrainingError, match="the same bytes after training as before"):
        train(load_recipe(tmp_path / "more/recipe.yaml", [f"run.dir={tmp_path}/run", "checkpoint.every_steps=100"]))
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_the_verb(trained, tmp_path):
    done = mtp("extend", str(trained), "--to", "6", "--out", "more", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "from 4 to 6 offsets" in done.stdout + done.stderr
    recipe = load_recipe(tmp_path / "more/recipe.yaml").recipe
    assert (recipe.first_trained_offset, recipe.init.path) == (5, str(tmp_path / "more"))
    refused = mtp("extend", str(trained), "--to", "2", "--out", "less", cwd=tmp_path)
    assert refused.returncode == CheckpointError.exit_code
    assert not (tmp_path / "less").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_on_two_ranks_too(trained, tmp_path, stage):
    extend_checkpoint(trained, tmp_path / "more", 6)
    spread = (
        f"strategy.kind={stage}",
        "strategy.ranks_per_node=2",
        "run.device=cpu",
        "run.dir=run",
        "batch.micro_batch_size=1",
    )
    done = mtp("train", "more/recipe.yaml", *spread, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    started, after = weights_of(tmp_path / "more"), weights_of(tmp_path / "run")
    moved = {name for name, value in after.items() if not torch.equal(value, started[name])}
    assert moved == {name for name in started if name.startswith(("heads.blocks.3", "heads.blocks.4"))} | {
        f"unembedding.norms.{k - 1}.weight" for k in (5, 6)
    }
    alone = mtp("train", "more/recipe.yaml", "run.dir=alone", "batch.micro_batch_size=1", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    for name, value in weights_of(tmp_path / "alone").items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4, msg=name)
