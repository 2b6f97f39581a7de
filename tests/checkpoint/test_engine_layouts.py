"""Folders for vLLM, SGLang and llama.cpp: what engines compute with them is what the heads compute here."""

import json

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.formats import FORMATS, check_holds, formats_for
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from mtp_lightning.evaluation.export_parity import check_parity
from mtp_lightning.recipe.draft_vocabulary import packed_ids
from tests.checkpoint import engine_layouts as engine
from tests.checkpoint.runs import save_run
from tests.decode.oracles import full_logits
from tests.support.covering import some_of
from tests.support.tiny import HEAD_KINDS, NEOX, tiny_model, tiny_recipe

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[transformers]'"
)
QWEN2 = {"family": "qwen2", "qkv_bias": True}
QWEN3 = {"family": "qwen3", "qk_norm": True, "head_dim": 6}
SCALED = {"rope_scaling": {"factor": 4.0, "original_positions": 8}}
TIED = {"tie_word_embeddings": True}
IDS = [0, 1, 3, 4, 7, 9, 12]
DRAFTED = {"draft_vocabulary": len(IDS), "draft_token_ids": packed_ids(IDS)}
PRE_NORM = HEAD_KINDS["sequential_pre_norm"]
TEXT = [1, 2, 3, 12, 0, 4, 4, 9, 11, 7, 8, 10]
TOKENS = torch.tensor([TEXT])


def exported(tmp_path, layout, heads, model=None, **options):
    """Export a tiny model with noise on every parameter: the folder, the model, and its scores of TEXT."""
    recipe = tiny_recipe(heads=heads | {"layers_from_trunk": False}, model=model or {})
    ours = tiny_model(recipe, torch.float32).requires_grad_(requires_grad=False)
    save_run(tmp_path / "run", recipe, 1, model=ours)
    export_model(tmp_path / "run", tmp_path / "out", layout, **options)
    return tmp_path / "out", ours, full_logits(ours, TEXT)


def settings_in(folder):
    return json.loads((folder / "config.json").read_text())


def assert_close(found, expected):
    largest = expected[expected.isfinite()].abs().max()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(largest))


def assert_trunk(served, scores):
    with torch.no_grad():
        assert_close(served.trunk(TOKENS).logits[0], scores[1])


@pytest.mark.parametrize("model", [{}, QWEN2, TIED | SCALED], ids=["llama", "qwen2", "tied"])
@pytest.mark.parametrize("heads", [PRE_NORM, PRE_NORM | {"concatenation": "embedding_first"}], ids=["mimo", "deepseek"])
def test_mimo_is_a_qwen2_with_a_module(heads, model, tmp_path):
    folder, _, scores = exported(tmp_path, "mimo", heads | {"num_offsets": 2}, model)
    served = engine.Served(transformers, folder)
    assert type(served.trunk).__name__ == "Qwen2ForCausalLM"
    assert_trunk(served, scores)
    assert_close(engine.mimo_scores(served, TOKENS)[0], scores[2][:-1])
    zeros = [value for name, value in served.tensors.items() if name.endswith("_proj.bias")]
    assert len(zeros) == 3 * 7
    assert all(bool((value == 0).all()) != bool(model.get("qkv_bias")) for value in zeros)


def test_mimo_comes_back_bit_for_bit(tmp_path):
    folder, ours, _ = exported(tmp_path, "mimo", PRE_NORM | {"num_offsets": 2}, QWEN2)
    import_folder(folder, tmp_path / "again", Wanted())
    again = dict(load_model(tmp_path / "again")[1].named_parameters())
    assert again.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(value, again[name]) for name, value in ours.named_parameters())


@pytest.mark.parametrize(
    ("heads", "model"),
    some_of(
        [
            ({"kind": "sequential", "num_offsets": 3}, QWEN3),
            ({"kind": "recursive", "num_offsets": 3}, QWEN3 | TIED),
            (PRE_NORM | {"num_offsets": 2}, QWEN3),
            (PRE_NORM | {"num_offsets": 2}, QWEN3 | TIED | SCALED),
        ],
        one_in=2,
    ),
    ids=["sequential", "recursive_tied", "folded", "folded_tied"],
)
@pytest.mark.parametrize("layout", ["qwen3_5", "gguf-ready"])
def test_qwen3_5_computes_what_qwen3_does(layout, heads, model, tmp_path):
    folder, _, scores = exported(tmp_path, layout, heads, model)
    served = engine.Served(transformers, folder)
    assert type(served.trunk).__name__ == "Qwen3_5ForCausalLM"
    assert_trunk(served, scores)
    assert_close(engine.qwen3_5_scores(served, TOKENS)[0], scores[2][:-1])
    told = settings_in(folder)
    assert (told["mtp_num_hidden_layers"], told["full_attention_interval"]) == (1, 1)
    assert (told["layer_types"][-1] == "linear_attention") == (layout == "gguf-ready")
    assert ("mrope_section" in told["rope_parameters"]) == (layout == "gguf-ready")
    assert sum(told["rope_parameters"].get("mrope_section", [3])) == 3


@pytest.mark.parametrize(
    ("heads", "model"),
    some_of(
        [
            ({"kind": "parallel", "num_offsets": 3}, {}),
            ({"kind": "parallel", "num_offsets": 2, "layers_per_head": 2, "unembedding": "replicated"}, QWEN2),
            ({"kind": "parallel", "num_offsets": 2}, TIED | SCALED),
            ({"kind": "chained", "order": "causal", "num_offsets": 3, "layers_per_head": 2}, {}),
            ({"kind": "chained", "order": "anticausal", "num_offsets": 3}, QWEN3),
            ({"kind": "chained", "order": "anticausal", "num_offsets": 2}, QWEN2),
            ({"kind": "linear", "num_offsets": 3}, QWEN3),
            ({"kind": "linear", "num_offsets": 3, "unembedding": "replicated"}, {}),
            ({"kind": "parallel", "num_offsets": 2} | DRAFTED, {}),
            ({"kind": "parallel", "num_offsets": 2, "unembedding": "replicated"} | DRAFTED, {}),
            ({"kind": "linear", "num_offsets": 2} | DRAFTED, TIED),
        ],
        one_in=2,
    ),
    ids=lambda value: str(value.get("kind") or "-".join(map(str, value)) or "llama"),
)
def test_eagle_drafts_with_the_second_offset(heads, model, tmp_path):
    folder, _, scores = exported(tmp_path, "eagle", heads, model)
    served, told = engine.Served(transformers, folder), settings_in(folder / "drafter")
    assert_trunk(served, scores)
    assert_close(engine.eagle_scores(served, folder / "drafter", told, TOKENS)[0], scores[2][:-1])
    (before,) = told["eagle_aux_hidden_state_layer_ids"]
    assert told["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [before - 1]
    assert ("lm_head.weight" in engine.tensors_of(folder / "drafter")) == (told["draft_vocab_size"] is not None)


@pytest.mark.parametrize(
    ("kind", "model", "drafted"),
    some_of(
        [
            ("medusa", {}, {}),
            ("medusa", QWEN3 | TIED, {}),
            ("medusa_replicated", QWEN2, {}),
            ("linear", {}, {}),
            ("linear", QWEN3 | TIED, {}),
            ("medusa", {}, DRAFTED),
            ("medusa_replicated", {}, DRAFTED),
            ("linear", {}, DRAFTED),
        ],
        one_in=2,
    ),
)
def test_medusa_drafts_with_all_heads(kind, model, drafted, tmp_path, capsys):
    heads = HEAD_KINDS[kind] | drafted
    check = check_parity if drafted and kind != "linear" else None  # linear: fewer rows than channels
    folder, _, scores = exported(tmp_path, "medusa", heads | {"num_offsets": 4}, model, check=check)
    served, told = engine.Served(transformers, folder), settings_in(folder / "drafter")
    assert_trunk(served, scores)
    assert told["original_lm_head"] == (kind == "medusa")
    found = engine.medusa_scores(served, folder / "drafter", told, TOKENS)
    assert len(found) == 3
    ids = IDS if drafted else range(told["vocab_size"])  # fewer are scored here; the drafter scores the others, too
    for offset, one in enumerate(found, 2):
        expected, made = scores[offset][:, ids], one[0][:, ids]
        if heads["kind"] == "linear":  # no norm behind the map: the same but for a factor
            made = made * (expected.norm(dim=-1) / made.norm(dim=-1))[:, None]
        assert_close(made, expected)
    assert ("no place for a draft vocabulary" in capsys.readouterr().out) == bool(drafted)


HELD = {
    ("parallel", "llama"): "trunk eagle",
    ("linear", "llama"): "trunk eagle medusa",
    ("causal", "llama"): "trunk eagle",
    ("anticausal", "llama"): "trunk eagle",
    ("medusa", "llama"): "trunk medusa",
    ("sequential_pre_norm", "llama"): "trunk mimo",
    ("parallel", "qwen3"): "trunk",
    ("anticausal", "qwen3"): "trunk eagle",
    ("sequential", "qwen3"): "trunk hf_mtp qwen3_5 gguf-ready",
    ("sequential_pre_norm", "qwen3"): "trunk qwen3_5 gguf-ready",
    ("recursive", "qwen3"): "trunk qwen3_5 gguf-ready",
    ("parallel_two_layers", "qwen2"): "trunk eagle",
    ("sequential_pre_norm", "qwen2"): "trunk mimo",
    ("medusa", "neox"): "trunk",
    ("parallel", "neox"): "trunk",
}
OURS = {"mimo", "qwen3_5", "eagle", "medusa", "gguf-ready"}


@pytest.mark.parametrize(("kind", "model"), HELD)
def test_a_kind_is_held_or_refused_with_the_formats_that_can(kind, model, tmp_path):
    sections = {"llama": {}, "qwen2": QWEN2, "qwen3": QWEN3, "neox": NEOX}
    recipe = tiny_recipe(heads=HEAD_KINDS[kind], model=sections[model])
    held = {*HELD[kind, model].split()} & OURS
    assert {*formats_for(recipe)} & OURS == held
    for name in OURS - held:
        with pytest.raises(CheckpointError) as refused:
            check_holds(name, recipe)
        assert all(one in refused.value.hint for one in held)
        assert refused.value.found


def test_what_no_layout_holds_is_named():
    found = {
        "matrix for each offset": {"heads": PRE_NORM | {"unembedding": "replicated"}},
        "2 layers in each head": {"heads": PRE_NORM | {"layers_per_head": 2}},
        "heads.hidden: post_norm": {"heads": {"kind": "sequential"}},
        "head_dim 6": {"heads": PRE_NORM, "model": {"head_dim": 6}},
        "no heads beyond": {"heads": PRE_NORM | {"num_offsets": 1}},
    }
    for what, sections in found.items():
        refusal = FORMATS["mimo"].refuses(tiny_recipe(**({"heads": PRE_NORM} | sections)))
        assert what in refusal.found, what
    mixed = tiny_recipe(heads={"kind": "linear"}, adapt={"layer_mix": {"main_head": False}})
    replicated = tiny_recipe(heads={"kind": "linear", "unembedding": "replicated"})
    assert "a matrix for each offset" in FORMATS["medusa"].refuses(replicated).found
    assert "mixtures" in FORMATS["medusa"].refuses(mixed).found


def test_a_norm_without_weight_cannot_be_divided_by(tmp_path):
    for layout, heads, model in (("qwen3_5", PRE_NORM | {"num_offsets": 2}, QWEN3), ("medusa", {"kind": "linear"}, {})):
        recipe = tiny_recipe(heads=heads | {"layers_from_trunk": False}, model=model)
        ours = tiny_model(recipe, torch.float32).requires_grad_(requires_grad=False)
        ours.unembedding.norms[0].weight[3] = 0
        save_run(tmp_path / layout, recipe, 1, model=ours)
        with pytest.raises(CheckpointError, match="1 of 16 are"):
            export_model(tmp_path / layout, tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()


def test_every_tensor_is_reported(tmp_path):
    folder, ours, _ = exported(tmp_path, "eagle", {"kind": "parallel", "num_offsets": 3})
    report = json.loads((folder / "export.json").read_text())
    assert {*report["written"], *report["left_out"]} == {name for name, _ in ours.named_parameters()}
    assert {name.split(".")[2] for name in report["left_out"]} == {"2"}
    stored = {*engine.tensors_of(folder)} | {f"drafter/{name}" for name in engine.tensors_of(folder / "drafter")}
    written = {tensor for tensors in report["written"].values() for tensor in tensors}
    assert written | {*report["made"]} == stored


def test_llama_cpps_table_knows_every_tensor(tmp_path):
    """The module's names are those that its converter gives them: `mtp.` becomes the block behind the last layer."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'mtp_lightning[gguf]'")
    folder, _, _ = exported(tmp_path, "gguf-ready", {"kind": "recursive", "num_offsets": 3}, QWEN3)
    num_layers = settings_in(folder)["num_hidden_layers"]
    renamed = {
        "fc": "eh_proj",
        "pre_fc_norm_embedding": "enorm",
        "pre_fc_norm_hidden": "hnorm",
        "norm": "shared_head.norm",
    }
    nextn = {
        name for kind, names in gguf.TensorNameMap.block_mappings_cfg.items() if "NEXTN" in kind.name for name in names
    }
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN35, num_layers + 1)
    for name in engine.tensors_of(folder):
        stem = name.removesuffix(".weight").removesuffix(".bias")
        if stem.removeprefix("mtp.") in renamed:
            assert f"model.layers.{{bid}}.{renamed[stem.removeprefix('mtp.')]}" in nextn
        else:
            stem = stem.replace("mtp.layers.0", f"model.layers.{num_layers}").replace("dt_bias", "dt_proj")
            assert table.get_name(stem), name
