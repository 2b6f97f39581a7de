"""Modules that published folders bring come in as heads of trunks of transformers' own classes, and go out again."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.merge_into import merge_into
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.huggingface.folder import open_folder
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.decode import generate
from mtp_lightning.errors import CheckpointError
from mtp_lightning.evaluation.export_parity import check_parity, predicted_accepts
from tests.checkpoint.runs import save_run

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
from tests.checkpoint.native_modules import CASES, RECURRENT, write  # noqa: E402
from tests.checkpoint.stock import assert_drafts_as_ours, loaded  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
TEXT = [5, 6, 7, 9, 3, 11, 60, 3, 4, 17, 33, 45, 4, 50, 12, 8]
QUICK = {"DeepSeek-V3", "Qwen3.5-attention", "Qwen3-Next"}
OTHER_FORMS = [("DeepSeek-V3", "hf_mtp"), ("Qwen3-Next", "qwen3_5"), ("Qwen3.5-MoE", "qwen3_5")]
over_all = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@over_all
@torch.no_grad()
def test_scores_of_every_offset_are_those_of_a_plain_loop_and_drafts_change_no_text(name, tmp_path):
    case, oracle = CASES[name], write(tmp_path / "hf", name)
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    recipe, model = load_model(tmp_path / "ours")
    assert (recipe.model.family, recipe.heads.kind) == ("transformers", "sequential")
    assert recipe.heads.num_offsets == 1 + case.num_modules
    told = json.loads((tmp_path / "ours/import.json").read_text())["parameters"]
    assert {one["how"] for one in told.values()} == {"loaded"}
    padded = torch.tensor([TEXT + [0] * model.num_offsets])
    ours = model.hidden_states(padded, torch.zeros_like(padded))
    for offset, expected in enumerate(oracle.logits(TEXT), 1):
        found = model.unembedding.logits(offset, ours[offset])[0][: len(expected)]
        assert expected.std() > 0.3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if name in RECURRENT:
        return
    said, new = list(TEXT), 24
    for _ in range(new + model.num_offsets):
        said.append(int(oracle.logits(said)[0][-1].argmax()))
    made = generate(model, [TEXT], max_new_tokens=new)
    assert made.tokens[0] == said[len(TEXT) :][:new]
    scores = dict(enumerate(oracle.logits(said), 1))
    assert made.statistics.accepted_by_row[0] == predicted_accepts(scores, len(TEXT), said, new)
    assert 0 < made.statistics.num_accepted_tokens < made.statistics.num_draft_tokens


def test_transformers_drafts_with_the_same_modules(tmp_path, monkeypatch):
    """Its own `MtpModel`, of the folder as it is."""
    kind = type(write(tmp_path / "hf", "GLM-4-MoE").model)
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\."])  # in a release, 46 or 92
    theirs = kind.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert_drafts_as_ours(theirs, load_model(tmp_path / "ours")[1], [TEXT])


@pytest.mark.parametrize(
    ("name", "form"),
    [("GLM-4-MoE", "hf_mtp"), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHER_FORMS)],
)
def test_a_new_folder_is_in_the_layout_of_the_release(name, form, tmp_path):
    """Also where the trunk was trained, too."""
    write(tmp_path / "hf", name)
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    export_model(tmp_path / "ours", tmp_path / "out", form)
    old, new = stored(tmp_path / "hf"), stored(tmp_path / "out")
    assert {*old} - {*new} == {one for one in old if one.endswith((".embed_tokens.weight", "_head.head.weight"))} & {
        one for one in old if one.startswith("model.layers.")
    }
    assert {*new} <= {*old}
    assert all(torch.equal(old[one], value) for one, value in new.items())
    assert open_folder(tmp_path / "out", family="transformers").native.count == CASES[name].num_modules
    if form == "hf_mtp":
        assert_drafts_as_ours(loaded(tmp_path / "out"), load_model(tmp_path / "ours")[1], [TEXT])


def test_other_heads_on_such_a_folder_leave_its_own_out_by_name(tmp_path, capsys):
    write(tmp_path / "hf", "GLM-4-MoE")
    import_folder(tmp_path / "hf", tmp_path / "linear", Wanted(kind="linear", num_offsets=3, init="random"))
    assert "own modules (DeepSeek: 1) are left out" in capsys.readouterr().out
    import_folder(tmp_path / "hf", tmp_path / "one", Wanted(num_offsets=1))
    import_folder(tmp_path / "hf", tmp_path / "unrolled", Wanted(kind="recursive", num_offsets=4))
    merge_into(tmp_path / "unrolled", tmp_path / "hf", tmp_path / "same")
    assert (tmp_path / "same/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_a_layer_of_another_type_than_the_last_one_stays_out(tmp_path):
    write(tmp_path / "hf", "Qwen3.5-attention")
    told = json.loads((tmp_path / "hf/config.json").read_text()) | {"mtp_layer_types": ["sliding_attention"]}
    (tmp_path / "hf/config.json").write_text(json.dumps(told))
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=2, init="random"))
    told = json.loads((tmp_path / "ours/import.json").read_text())
    assert "mtp_layer_types sliding_attention behind a last layer of full_attention" in told["notes"][0]


def without(tensor: str):
    return lambda tensors: tensors.pop(tensor)


def renumbered(tensors):
    for name in [one for one in tensors if ".3." in one and "expert" not in one]:
        tensors[name.replace(".3.", ".7.")] = tensors.pop(name)


SPOILT = {
    "without its projection": (without("model.layers.3.eh_proj.weight"), "model.layers.3.enorm.weight"),
    "without its norm": (without("model.layers.3.shared_head.norm.weight"), "missing: model.layers.3.shared_head.norm"),
    "without an expert": (without("model.layers.3.mlp.experts.2.up_proj.weight"), "experts"),
    "behind a gap": (renumbered, "missing: model.layers.3"),
    "with more": (lambda tensors: tensors.update({"model.layers.3.x": torch.ones(2)}), "unexpected: model.layers.3.x"),
    "of another width": (
        lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(32, 32)}),
        "eh_proj.weight .32, 32. instead of .32, 64.",
    ),
    "with an embedding of its own": (
        lambda tensors: tensors["model.layers.3.embed_tokens.weight"].mul_(2),
        "unexpected: model.layers.3.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_module_that_is_not_whole_is_named(name, tmp_path):
    write(tmp_path / "hf", "GLM-4-MoE")
    change, found = SPOILT[name]
    tensors = stored(tmp_path / "hf")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=found):
        import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    assert not (tmp_path / "ours").exists()


def trained(tmp_path: Path, change: float = 0.01) -> Path:
    recipe, model = load_model(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("heads.") or (name.startswith("unembedding.norms") and ".0." not in name):
                parameter += change * torch.randn(parameter.shape)
    save_run(tmp_path / "run", recipe, 3, model=model)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "dtype", "check"),
    [
        ("Qwen3.5-VL", torch.float32, None),
        *(pytest.param(name, torch.bfloat16, check_parity, marks=pytest.mark.slow) for name in sorted(CASES)),
    ],
)
def test_trained_modules_go_back_and_nothing_else_changes(name, dtype, check, tmp_path):
    write(tmp_path / "hf", name, dtype=dtype)
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    merge_into(tmp_path / "ours", tmp_path / "hf", tmp_path / "same")
    before = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "same").iterdir() if file.name in before} == before
    merge_into(trained(tmp_path), tmp_path / "hf", tmp_path / "out", check=check)
    old, new = stored(tmp_path / "hf"), stored(tmp_path / "out")
    last = f"model.layers.{3 if CASES[name].layout == 'DeepSeek' else 9}."
    for tensor, value in old.items():
        is_head = tensor.startswith(("mtp.", last, "model.layers.4.")) and "embed_tokens" not in tensor
        is_changed = is_head and "shared_head.head" not in tensor
        assert new[tensor].dtype == value.dtype
        assert torch.equal(new[tensor], value) != is_changed, tensor
    assert [*new] == [*old]
    import_folder(tmp_path / "out", tmp_path / "again", Wanted())
    ours, again = (dict(load_model(tmp_path / one)[1].named_parameters()) for one in ("run", "again"))
    assert all(torch.equal(one.to(dtype), again[name].to(dtype)) for name, one in ours.items())
