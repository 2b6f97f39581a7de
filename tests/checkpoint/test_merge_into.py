"""Heads that came with a folder are trained and go back into a copy of it; not one other bit is touched."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export import merge_into as module
from mtp_lightning.checkpoint.export.merge_into import merge_into
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.cli.app import app
from mtp_lightning.errors import CheckpointError
from mtp_lightning.evaluation.export_parity import check_parity
from tests.checkpoint.foreign import HEAD_WIDTH, LAYERS, llama_tensors, module_tensors, write_folder
from tests.checkpoint.runs import save_run, stored
from tests.support.covering import some_of

QKV = {"q": 16, "k": 8, "v": 8}


def tensors_of(layout: str) -> dict[str, Tensor]:
    """A trunk, and two modules where the layout has several."""
    tensors = llama_tensors() | module_tensors(layout)
    if layout == "deepseek":
        tensors |= module_tensors(layout, 1)
    blocks = [name.removesuffix("q_proj.weight") for name in tensors if name.endswith("q_proj.weight")]
    if layout == "mimo":
        tensors |= {f"{block}{one}_proj.bias": torch.randn(size) for block in blocks for one, size in QKV.items()}
    if layout == "qwen":
        tensors |= {f"{block}{one}_norm.weight": torch.ones(HEAD_WIDTH) for block in blocks for one in ("q", "k")}
    return tensors


SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek": {"num_nextn_predict_layers": 2},
    "mimo": {"model_type": "mimo", "num_nextn_predict_layers": 1},
    "qwen": {"model_type": "qwen3", "head_dim": HEAD_WIDTH},
}


def shard(folder: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]
    weight_map = {name: names[place % num_shards] for place, name in enumerate(tensors)}
    for one in names:
        part = {name: value for name, value in tensors.items() if weight_map[name] == one}
        safetensors.torch.save_file(part, folder / one, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def trained_run(tmp_path: Path, *, base: float = 0.0, **wanted: Any) -> Path:
    """Import the folder, and change its heads; with `base` one matrix of its trunk, too."""
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(**wanted))
    recipe, model = load_model(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("heads.") or (name.startswith("unembedding.norms") and ".0." not in name):
                parameter += 0.01 * torch.randn(parameter.shape)
        model.trunk.layers[1].mlp.up_proj.weight += base
    save_run(tmp_path / "run", recipe, 3, model=model)
    return tmp_path / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("layout", "dtype", "num_shards"),
    some_of([(name, *saved) for name in SETTINGS for saved in ((torch.float32, 1), (torch.bfloat16, 3))], one_in=3),
)
def test_only_the_heads_change(layout: str, dtype: torch.dtype, num_shards: int, tmp_path: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in tensors_of(layout).items()}
    write_folder(tmp_path / "hf", tensors, **SETTINGS[layout])
    if num_shards > 1:
        shard(tmp_path / "hf", tensors, num_shards)
    (tmp_path / "hf/README.md").write_text("theirs")
    merge_into(trained_run(tmp_path), tmp_path / "hf", tmp_path / "out", check=check_parity)
    before, after = files(tmp_path / "hf"), files(tmp_path / "out")
    assert after.keys() - before.keys() == {"export.json", "parity.json"}
    assert all(
        after[name] == one for name, one in before.items() if not name.startswith("model-") and "model.s" not in name
    )
    assert [len(after[name]) for name in before] == [len(one) for one in before.values()]
    found = stored(tmp_path / "out")
    heads = {*tensors} - {*llama_tensors()} - {name for name in tensors if name.startswith(tuple(trunk_names()))}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value) == (name not in heads), name
        assert found[name].dtype == dtype
    written = json.loads(after["export.json"])["written"]
    assert {*written.values()} == heads
    ours = dict(load_model(tmp_path / "run")[1].named_parameters())
    assert all(torch.equal(found[to], ours[name].to(dtype)) for name, to in written.items())
    told = json.loads(after["parity.json"])["judges"][0]
    assert len(told["deviation"]) == (3 if layout == "deepseek" else 2)


def trunk_names() -> list[str]:
    return [f"model.layers.{layer}." for layer in range(LAYERS)]


def test_one_module_that_was_unrolled_goes_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", tensors_of("qwen"), **SETTINGS["qwen"])
    run = trained_run(tmp_path, num_offsets=4, kind="recursive", init="native")
    merge_into(run, tmp_path / "hf", tmp_path / "out", check=check_parity)
    assert not torch.equal(stored(tmp_path / "out")["mtp.fc.weight"], stored(tmp_path / "hf")["mtp.fc.weight"])


def refused(tmp_path: Path, run: Path, folder: str = "hf") -> CheckpointError:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError) as error:
        merge_into(run, tmp_path / folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return error.value


def test_what_does_not_agree_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", tensors_of("deepseek"), **SETTINGS["deepseek"])
    run = trained_run(tmp_path)
    other = tensors_of("deepseek")
    other["model.layers.1.mlp.up_proj.weight"][3, 3] += 1e-6
    write_folder(tmp_path / "other", other, **SETTINGS["deepseek"])
    error = refused(tmp_path, run, "other")
    assert "others in 1 of 30 tensors: model.layers.1.mlp.up_proj.weight" in error.found
    write_folder(tmp_path / "settings", tensors_of("deepseek"), **SETTINGS["deepseek"], rope_theta=5000.0)
    assert "model.rope_theta = 10000.0, in the folder 5000.0" in refused(tmp_path, run, "settings").found
    write_folder(tmp_path / "plain", llama_tensors())
    assert "none in" in refused(tmp_path, run, "plain").found
    write_folder(tmp_path / "one", llama_tensors() | module_tensors("deepseek"), num_nextn_predict_layers=1)
    assert f"model.layers.{LAYERS + 1}.enorm.weight" in refused(tmp_path, run, "one").found
    write_folder(tmp_path / "mimo", tensors_of("mimo"), **SETTINGS["mimo"])
    assert "heads.hidden = post_norm" in refused(tmp_path, run, "mimo").found
    assert "must be new or empty" in refused(tmp_path, run, "hf").expected if (tmp_path / "out").mkdir() else True


def test_a_trunk_that_was_trained_too_is_another_base(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", tensors_of("deepseek"), **SETTINGS["deepseek"])
    error = refused(tmp_path, trained_run(tmp_path, base=1e-6))
    assert "model.layers.1.mlp.up_proj.weight" in error.found
    assert "freeze: [offsets_below_2]" in error.hint


def test_heads_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", tensors_of("deepseek"), **SETTINGS["deepseek"])
    run = trained_run(tmp_path, num_offsets=3, kind="parallel", init="copy", allow=("model.layers.[34].*",))
    assert "heads.kind = parallel" in refused(tmp_path, run).found


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "hf", tensors_of("mimo"), **SETTINGS["mimo"])
    run = trained_run(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_over", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_into(run, tmp_path / "hf", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    monkeypatch.setattr(module, "_check_written", lambda *_: None)
    monkeypatch.setattr(module, "_write_over", lambda *_: None)  # and heads that are as they were fail --verify
    with pytest.raises(CheckpointError, match="offset 2, by mtp import: a head is lost, or another one"):
        merge_into(run, tmp_path / "hf", tmp_path / "out", check=check_parity)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_full_disk_and_a_value_beyond_the_type(tmp_path: Path, small_disk: Path) -> None:
    write_folder(tmp_path / "hf", {k: v.to(torch.float16) for k, v in tensors_of("mimo").items()}, **SETTINGS["mimo"])
    (tmp_path / "hf/notes.bin").write_bytes(bytes(2**21))
    run = trained_run(tmp_path)
    with pytest.raises(CheckpointError, match="MiB needed"):
        merge_into(run, tmp_path / "hf", small_disk / "out")
    recipe, model = load_model(run)
    model.heads.blocks[0].eh_proj.weight[0, 0] = 1e6
    save_run(run, recipe, 4, model=model)
    with pytest.raises(CheckpointError, match=r"one of model.mtp_layers.0.input_proj.weight beyond torch.float16"):
        merge_into(run, tmp_path / "hf", tmp_path / "out")
    assert not [path for path in (*tmp_path.iterdir(), *small_disk.iterdir()) if "out" in path.name]


def test_the_verb(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", tensors_of("mimo"), **SETTINGS["mimo"])
    run = trained_run(tmp_path)
    arguments = ["export", str(run), "--out", str(tmp_path / "out"), "--merge-into", str(tmp_path / "hf")]
    result = CliRunner().invoke(app, [*arguments, "--verify"])
    assert result.exit_code == 0, result.output
    assert "Merged 16 tensors" in result.stdout
    assert CliRunner().invoke(app, [*arguments, "--format", "mimo"]).exit_code == 2
