import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from mtp_lightning.checkpoint.convert.add_heads import extend_checkpoint
from mtp_lightning.checkpoint.convert.consolidate import consolidate
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format import folder as folder_module
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.errors import CheckpointError, file_system_error
from mtp_lightning.files.atomic_folder import remove_folder
from mtp_lightning.model.mtp_model import build_model
from tests.checkpoint.runs import flip_a_byte, is_same_model, model_of_step, save_run
from tests.checkpoint.savers import shards
from tests.support.covering import some_of
from tests.support.tiny import HEAD_KINDS, tiny_recipe

RECIPE = tiny_recipe()


@pytest.mark.parametrize(("kind", "num_ranks"), some_of(product(HEAD_KINDS, (1, 3)), one_in=3))
def test_a_model_of_any_kind_comes_back_from_run_and_export(tmp_path: Path, kind: str, num_ranks: int) -> None:
    recipe = tiny_recipe(heads=HEAD_KINDS[kind])
    save_run(tmp_path / "run", recipe, 7, num_ranks=num_ranks)
    consolidate(tmp_path / "run", tmp_path / "out")
    for folder in (tmp_path / "run", tmp_path / "out"):
        loaded_recipe, model = load_model(folder)
        assert loaded_recipe == recipe
        assert is_same_model(model, model_of_step(recipe, 7))
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_run_that_removes_what_is_read_gives_its_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training goes on: two checkpoints later the one that is being read is removed."""
    save_run(tmp_path, RECIPE, 1)
    digest_of = folder_module._digest_of

    def going_on(file: Path, advance: Callable[[int], None]) -> str:
        if file.parent.name == "step-00000001" and file.parent.exists():
            save_run(tmp_path, RECIPE, 2)
            remove_folder(file.parent)
        return digest_of(file, advance)

    monkeypatch.setattr(folder_module, "_digest_of", going_on)
    assert open_checkpoint(tmp_path).step == 2


def test_a_checkpoint_that_is_gone_is_told_as_that(tmp_path: Path) -> None:
    save_run(tmp_path, RECIPE, 1)
    found = open_checkpoint(tmp_path, verify=False)
    remove_folder(found.path)
    with pytest.raises(CheckpointError, match=r"must stay while it is read; found .*step-00000001 is gone"):
        found.verify()
    with pytest.raises(FileNotFoundError) as missing:
        _ = found.sha256
    assert isinstance(file_system_error(missing.value), CheckpointError)


def test_a_new_model_is_saved_as_it_was_built(tmp_path: Path) -> None:
    save_run(tmp_path, RECIPE, 1, num_ranks=2, model=build_model(RECIPE))
    assert is_same_model(load_model(tmp_path)[1], build_model(RECIPE))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path: Path, num_ranks: int) -> None:
    recipe = tiny_recipe(model={"tie_word_embeddings": True})
    save_run(tmp_path / "run", recipe, 7, num_ranks=num_ranks)
    consolidate(tmp_path / "run", tmp_path / "out", dtype="bf16")
    for folder, dtype in ((tmp_path / "run", torch.float32), (tmp_path / "out", torch.bfloat16)):
        model = load_model(folder)[1]
        assert model.unembedding.matrices[0] is model.trunk.embed_tokens.weight
        assert is_same_model(model, model_of_step(recipe, 7).to(dtype))


def test_replicated_unembeddings_are_loaded_each(tmp_path: Path) -> None:
    recipe = tiny_recipe(heads=HEAD_KINDS["medusa_replicated"])
    save_run(tmp_path, recipe, 7, num_ranks=2)
    first, *others = load_model(tmp_path)[1].unembedding.matrices
    assert len(others) == 3
    assert not any(torch.equal(first, other) for other in others)


def test_the_loaded_model_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    save_run(tmp_path, RECIPE, 7, num_ranks=3)
    tokens, documents = torch.randint(13, (2, 13)), torch.zeros(2, 13, dtype=torch.long)
    loaded, saved = load_model(tmp_path)[1], model_of_step(RECIPE, 7)
    states = loaded.hidden_states(tokens, documents)
    assert all(torch.equal(state, states[k]) for k, state in saved.hidden_states(tokens, documents).items())


def test_a_type_can_be_asked_for(tmp_path: Path) -> None:
    save_run(tmp_path, RECIPE, 7)
    model = load_model(tmp_path, dtype=torch.float16)[1]
    assert is_same_model(model, model_of_step(RECIPE, 7).half())


def test_the_newest_complete_checkpoint_of_a_run_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save_run(tmp_path / "run", RECIPE, step) for step in (1, 2, 3)]
    assert open_checkpoint(tmp_path / "run").path == paths[2]
    (paths[2] / shards(1)[1]).unlink()
    assert open_checkpoint(tmp_path / "run").path == paths[1]
    assert f"Passing over step-00000003: no such file: {paths[2] / shards(1)[1]}" in capsys.readouterr().err
    with pytest.raises(DamagedCheckpointError, match=rf"The checkpoint before it is good: {paths[1]}"):
        open_checkpoint(paths[2])
    monkeypatch.chdir(paths[0])
    assert open_checkpoint(Path()).path == paths[0]
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(Path("run")).path == paths[1]


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no folder {tmp_path}/nowhere"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=rf"neither checkpoints/ nor MANIFEST\.json nor config\.json in {tmp_path}"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=f"none in {tmp_path}/checkpoints"):
        open_checkpoint(tmp_path)


def test_a_run_of_an_earlier_format_is_said_so(tmp_path: Path) -> None:
    manifest = save_run(tmp_path, RECIPE, 1) / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(CheckpointError, match=r"found 1 in .*MANIFEST\.json, written by mtp_lightning 0"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_shard_is_named_and_the_good_checkpoint_before_offered(tmp_path: Path, rank: int) -> None:
    paths = [save_run(tmp_path, RECIPE, step, num_ranks=2) for step in (1, 2, 3, 4)]
    flip_a_byte(paths[2] / shards(2)[0])
    flip_a_byte(paths[3] / shards(2)[rank])
    with pytest.raises(DamagedCheckpointError) as failure:
        load_model(tmp_path)
    assert str(paths[3] / shards(2)[rank]) in failure.value.found
    assert failure.value.hint == f"The checkpoint before it is good: {paths[1]}"
    assert load_model(failure.value.hint.split(": ")[1])
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [path.name for path in paths]


def test_nothing_is_offered_where_nothing_is_good(tmp_path: Path) -> None:
    path = save_run(tmp_path, RECIPE, 1)
    save_run(tmp_path, RECIPE, 2)
    flip_a_byte(path / shards(1)[0])
    with pytest.raises(DamagedCheckpointError, match="No good checkpoint lies before it"):
        load_model(path)


def test_digests_need_not_be_compared_but_sizes_are(tmp_path: Path) -> None:
    path = save_run(tmp_path, RECIPE, 1) / shards(1)[0]
    flip_a_byte(path)
    load_model(tmp_path, verify=False)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DamagedCheckpointError, match=str(path)):
        load_model(path.parent, verify=False)


def test_damaged_moments_do_not_keep_the_model_from_being_loaded(tmp_path: Path) -> None:
    path = save_run(tmp_path, RECIPE, 1)
    flip_a_byte(path / shards(1)[1])
    load_model(tmp_path)


@pytest.mark.parametrize("harmed", ["model.safetensors", "recipe.yaml"])
def test_a_damaged_export_is_refused(tmp_path: Path, harmed: str) -> None:
    save_run(tmp_path / "run", RECIPE, 1)
    consolidate(tmp_path / "run", tmp_path / "out")
    flip_a_byte(tmp_path / "out" / harmed)
    with pytest.raises(DamagedCheckpointError, match=str(tmp_path / "out" / harmed)):
        load_model(tmp_path / "out")
    (tmp_path / "out" / harmed).unlink()
    with pytest.raises(DamagedCheckpointError, match="no such file"):
        load_model(tmp_path / "out", verify=False)


@pytest.mark.parametrize(
    ("config", "found"), [("{}", "Field required"), ('{"format": "hf"}', "format: "), ("[", "Invalid JSON")]
)
def test_a_config_of_someone_else_is_said_so(tmp_path: Path, config: str, found: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"{found}.*{tmp_path}/config.json"):
        load_model(tmp_path)


def test_every_tensor_is_used_and_every_parameter_filled(tmp_path: Path) -> None:
    wider = tiny_recipe(model={"intermediate_size": 32}, heads={"unembedding": "replicated"})
    save_run(tmp_path, RECIPE, 1, model=model_of_step(wider, 1))
    with pytest.raises(CheckpointError) as failure:
        load_model(tmp_path)
    assert "3 unused: unembedding.lm_heads.1.weight, unembedding.lm_heads.2.weight" in failure.value.found
    assert "18 of another shape: " in failure.value.found
    assert "down_proj.weight [16, 32] instead of [16, 24]" in failure.value.found
    save_run(tmp_path, wider, 2, model=model_of_step(RECIPE, 1))
    with pytest.raises(CheckpointError, match=r"3 missing: unembedding.lm_heads.1.weight"):
        load_model(tmp_path)


def test_a_checkpoint_without_its_recipe_is_no_model(tmp_path: Path) -> None:
    path = save_run(tmp_path, RECIPE, 1)
    manifest = path / "MANIFEST.json"
    (path / "recipe.yaml").rename(path / "notes.yaml")
    manifest.write_text(manifest.read_text().replace("recipe.yaml", "notes.yaml"))
    with pytest.raises(DamagedCheckpointError, match=f"no recipe.yaml in {path}"):
        load_model(path)


def test_every_file_of_a_model_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "run", RECIPE, 1, num_ranks=2)
    read: list[str] = []
    digest_of = folder_module._digest_of

    def recorded(file: Path, advance: object) -> str:
        read.append(file.name)
        return digest_of(file, advance)

    monkeypatch.setattr(folder_module, "_digest_of", recorded)
    model_files = [*(name for name in shards(2) if name.startswith("model")), "recipe.yaml"]
    for use in (
        lambda: load_model(tmp_path / "run"),
        lambda: consolidate(tmp_path / "run", tmp_path / "out"),
        lambda: export_model(tmp_path / "run", tmp_path / "hf"),
    ):
        use()
        assert sorted(read) == sorted(model_files)
        read.clear()
    opened = open_checkpoint(tmp_path / "run", verify=False)
    assert read == ["recipe.yaml"]
    flip_a_byte(opened.path / model_files[0])
    with pytest.raises(DamagedCheckpointError, match=model_files[0]):
        opened.verify()


@pytest.mark.parametrize("use", ["export", "export_hf", "extend"])
def test_damage_is_found_before_anything_is_built_from_it(tmp_path: Path, use: str) -> None:
    recipe = tiny_recipe(heads=HEAD_KINDS["sequential"])
    flip_a_byte(save_run(tmp_path / "run", recipe, 1) / shards(1)[0])
    with pytest.raises(DamagedCheckpointError, match=shards(1)[0]):
        {
            "export": lambda: consolidate(tmp_path / "run", tmp_path / "out"),
            "export_hf": lambda: export_model(tmp_path / "run", tmp_path / "out"),
            "extend": lambda: extend_checkpoint(tmp_path / "run", tmp_path / "out", 8),
        }[use]()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
