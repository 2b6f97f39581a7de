"""Training starts from an imported folder as it is written, on one rank or in pieces of ZeRO-3."""

import json

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.checkpoint.foreign import llama_tensors, write_folder
from tests.support.runs import mtp

BYTES = 257
STILL = ("optimizer.lr=1e-6", "optimizer.weight_decay=0", "optimizer.warmup_steps=0")
SHORT = (
    "data.corpus=[stdlib:json]",
    "data.validation_fraction=0.2",
    "data.seq_len=32",
    "batch={global_batch_size: 4, micro_batch_size: 2}",
    "run.steps=2",
    "run.validate_every_steps=2",
    "run.validation_samples=2",
    "checkpoint.every_steps=2",
    "run.device=cpu",
    "run.threads=1",
)


def imported(family, tmp_path):
    """A pretrained model of bytes, imported with heads on it."""
    if family == "llama":
        outside = {name: 0.3 * torch.randn(BYTES, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        write_folder(tmp_path / "hf", llama_tensors() | outside, vocab_size=BYTES)
    else:
        write_neox(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=3))
    return tmp_path / "ours"


def own_folders(tmp_path):
    return f"run.dir={tmp_path / 'run'}", f"run.cache={tmp_path / 'cache'}"


def write_neox(path):
    settings = {"model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"intermediate_size": 32, "vocab_size": BYTES, "max_position_embeddings": 64, "rotary_pct": 0.5}
    shapes = {"gpt_neox.embed_in.weight": (BYTES, 16), "embed_out.weight": (BYTES, 16)}
    norms = [f"layers.{n}.{kind}_layernorm" for n in (0, 1) for kind in ("input", "post_attention")]
    for owner in ("final_layer_norm", *norms):
        shapes |= {f"gpt_neox.{owner}.{kind}": (16,) for kind in ("weight", "bias")}
    matrices = {"attention.query_key_value": (48, 16), "attention.dense": (16, 16)}
    matrices |= {"mlp.dense_h_to_4h": (32, 16), "mlp.dense_4h_to_h": (16, 32)}
    for layer in ("gpt_neox.layers.0", "gpt_neox.layers.1"):
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{layer}.{name}.bias": shape[:1] for name, shape in matrices.items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    tensors = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors")


def assert_started_from(run, folder):
    """Two steps of next to no length leave the weights where they began."""
    found, expected = ShardReader(run / "checkpoints/step-00000002"), load_model(folder)[1]
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.read(name).view(parameter.shape), parameter, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_on_one_rank(family, tmp_path):
    folder = imported(family, tmp_path)
    assert train(load_recipe(folder / "recipe.yaml", [*SHORT, *STILL, *own_folders(tmp_path)])) == 0
    assert_started_from(tmp_path / "run", folder)


def test_positions_may_be_scaled_anew_and_not_otherwise(tmp_path, capsys):
    """For windows beyond those of the model; a scaling that is forgotten, or another base, is a mistake."""
    folder, longer = imported("llama", tmp_path), ("data.seq_len=96", "model.max_position_embeddings=128")
    scaled = "model.rope_scaling={kind: yarn, factor: 4, original_positions: 32}"
    fields = (*SHORT, *STILL, *own_folders(tmp_path), *longer)
    assert train(load_recipe(folder / "recipe.yaml", [*fields, scaled])) == 0
    assert "with its positions scaled: yarn, factor 4" in capsys.readouterr().out
    assert_started_from(tmp_path / "run", folder)
    then = (*fields, f"init.path={tmp_path / 'run'}", f"run.dir={tmp_path / 'then'}")
    assert train(load_recipe(folder / "recipe.yaml", [*then, scaled.replace("factor: 4", "factor: 8")])) == 0
    wrong = [("scaling", "run.seed=1"), ("scaling", scaled.replace("yarn", "llama3"))]
    wrong += [("scaling", scaled.replace("factor: 4", "factor: 2")), ("theta", "model.rope_theta=7")]
    for what, other in wrong:
        with pytest.raises(CheckpointError, match=f"model.rope_{what}"):
            train(load_recipe(folder / "recipe.yaml", [*then, f"run.dir={tmp_path / 'other'}", other]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_in_pieces_of_zero_3(family, tmp_path):
    folder = imported(family, tmp_path)
    ranks = ("strategy.kind=zero3", "strategy.ranks_per_node=2", "batch.micro_batch_size=1")
    done = mtp("train", str(folder / "recipe.yaml"), *SHORT, *STILL, *own_folders(tmp_path), *ranks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_started_from(tmp_path / "run", folder)


@pytest.mark.parametrize("change", ["partial_rotary_factor=1", "parallel_residual=false"])
def test_another_way_of_computing_is_refused(change, tmp_path):
    recipe = load_recipe(
        imported("gpt_neox", tmp_path) / "recipe.yaml", [*SHORT, *own_folders(tmp_path), f"model.{change}"]
    )
    with pytest.raises(CheckpointError, match=f"model.{change.partition('=')[0]} .* there and .* here"):
        train(recipe)


AS_IMPORTED = tuple(field for field in SHORT if not field.startswith("run.steps"))  # lr 1e-5, 100 steps of warm-up


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "zero3"])
def test_large_norms_and_blocks_of_zeros_are_no_faults(tmp_path, kind):
    """As pretrained models have them, and as block expansion puts them in: at the first rate of the warm-up, 1e-7."""
    outside = {name: 0.3 * torch.randn(BYTES, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors = llama_tensors() | outside
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(8.0)
        if "layers.1." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    write_folder(tmp_path / "hf", tensors, vocab_size=BYTES)
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=3))
    recipe = str(tmp_path / "ours/recipe.yaml")
    done = mtp(
        "train", recipe, *AS_IMPORTED, *own_folders(tmp_path), "run.steps=6", f"strategy.kind={kind}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "too small to show in" in done.stdout
