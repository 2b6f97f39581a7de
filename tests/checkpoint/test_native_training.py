"""Heads that came with a folder survive a whole run: import, training on a frozen trunk, and the way back, as verbs."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

from tests.checkpoint.runs import stored
from tests.support.runs import last_step, mtp, mtp_killed

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
from tests.checkpoint import native_modules  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")]
BYTES, WIDTH, LAYERS = 257, 32, 3
STEPS = 40
TRAINED = (
    "freeze=[offsets_below_2]",
    "objective.distill={alpha: [0], beta: [1], top_k: all}",  # of a random trunk: its text is what can be drafted
    "data.corpus=[text.jsonl]",
    "data.validation_fraction=0.2",
    "data.seq_len=48",
    "batch={global_batch_size: 8, micro_batch_size: 4}",
    f"run={{steps: {STEPS}, dir: run, cache: cache, device: cpu, threads: 1}}",
    "run.validate_every_steps=20",
    "run.validation_samples=8",
    "optimizer.lr=1e-2",
    "optimizer.warmup_steps=2",
    "checkpoint.every_steps=10",
    "logging.every_steps=1",
)


class Case(NamedTuple):
    """A folder, the format that a new one of its layout has, its heads' prefixes, and what else a run is told."""

    folder: str
    form: str
    heads: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


def ranks(stage: str) -> tuple[str, ...]:
    return (f"strategy={{kind: {stage}, ranks_per_node: 2}}",)


COPIES, BUFFER = (".embed_tokens.weight", "shared_head.head.weight"), "e_score_correction_bias"  # has no gradient
DEEPSEEK, MIMO = ("model.layers.3.", "model.layers.4."), ("model.mtp_layers.0.",)
CASES = {
    "DeepSeek-V3": Case("DeepSeek-V3", "hf_mtp", DEEPSEEK),
    "DeepSeek-V3 in bf16": Case("DeepSeek-V3", "hf_mtp", DEEPSEEK, dtype=torch.bfloat16),
    "Qwen3.5": Case("Qwen3.5", "qwen3_5", ("mtp.",)),
    "Qwen3.5 unrolled": Case("Qwen3.5-attention", "qwen3_5", ("mtp.",), ("heads.kind=recursive",)),
    "MiMo": Case("MiMo", "mimo", MIMO),
    "MiMo under zero1": Case("MiMo", "mimo", MIMO, ranks("zero1")),
    "DeepSeek-V3 under zero2": Case("DeepSeek-V3", "hf_mtp", DEEPSEEK, ranks("zero2")),
    "MiMo under zero3": Case("MiMo", "mimo", MIMO, ranks("zero3")),
}


def write(folder: Path, case: Case) -> None:
    """Write the folder as it is published, and the text to train on."""
    words = ["".join(random.Random(word).choices("abcdefgh", k=4)) for word in range(8)]
    texts = [" ".join(random.Random(row).choices(words, k=60)) for row in range(60)]
    (folder.parent / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if case.folder == "MiMo":
        write_mimo(folder)
    else:
        native_modules.write(folder, case.folder, vocab_size=BYTES, dtype=case.dtype)
    (folder / "README.md").write_text("theirs")


@torch.no_grad()
def write_mimo(folder: Path) -> None:
    """A Qwen2 of transformers, whose last layer is MiMo's module."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "vocab_size": BYTES}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = transformers.Qwen2Config(**sizes, **heads, num_hidden_layers=LAYERS + 1, tie_word_embeddings=False)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tensors, last, prefix = stored(folder), f"model.layers.{LAYERS}.", MIMO[0]
    for name in [one for one in tensors if one.startswith(last)]:
        tensors[name.replace(last, prefix)] = tensors.pop(name)
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    tensors |= {f"{prefix}{norm}.weight": 1 + 0.1 * torch.randn(WIDTH) for norm in norms}
    tensors[f"{prefix}input_proj.weight"] = 0.2 * torch.randn(WIDTH, 2 * WIDTH)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    told["layer_types"] = told["layer_types"][:LAYERS]
    told |= {"model_type": "mimo", "num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(told))


def done(cwd: Path, *arguments: str) -> str:
    """Run a verb to a good end, and return what it has said."""
    ended = mtp(*arguments, cwd=cwd)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def acceptance(cwd: Path, path: str) -> float:
    """Tokens a step with the heads of a folder, by the verb that tells."""
    (shards,) = (cwd / "cache").glob("data-*")
    done(cwd, "eval", "acceptance", path, "--rows", "8", "--shards", str(shards), "--json", f"{path}.json")
    return float(json.loads((cwd / f"{path}.json").read_text())["figures"]["mean_acceptance_length"])


def trained(cwd: Path, case: Case) -> None:
    """Import the folder and train its heads; on several ranks a killed run goes on."""
    unrolled = ("--kind", "recursive", "--offsets", "3") if "heads.kind=recursive" in case.overrides else ()
    assert "loaded" in done(cwd, "import", "hf", "--out", "imported", *unrolled)
    command = ("train", "imported/recipe.yaml", *TRAINED, *case.overrides)
    if case.overrides and not unrolled:
        assert mtp_killed(*command, cwd=cwd, metrics=cwd / "run/metrics.csv", after_step=14, seed=1) == -9
        assert 10 <= last_step(cwd / "run/metrics.csv") < STEPS
    done(cwd, *command)
    assert last_step(cwd / "run/metrics.csv") == STEPS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_trained_heads_go_back_where_they_came_from(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    write(tmp_path / "hf", case)
    trained(tmp_path, case)
    assert acceptance(tmp_path, "run") > 1.15 * acceptance(tmp_path, "imported")
    said = done(tmp_path, "export", "run", "--merge-into", "hf", "--out", "merged", "--verify")
    assert "Verified" in said
    assert "never trained" not in said
    done(tmp_path, "export", "run", "--format", case.form, "--out", "new", "--verify")
    before, merged, new = (stored(tmp_path / one) for one in ("hf", "merged", "new"))
    assert [*merged] == [*before]
    for tensor, value in before.items():
        is_copy = tensor.startswith(case.heads) and tensor.endswith(COPIES)
        is_trained = tensor.startswith(case.heads) and not is_copy and not tensor.endswith(BUFFER)
        assert merged[tensor].dtype == value.dtype
        assert torch.equal(merged[tensor], value) != is_trained, tensor
        assert is_copy or torch.equal(new[tensor].to(value.dtype), merged[tensor]), tensor
    assert {*new} <= {*before}
    for file in (tmp_path / "hf").iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()
    done(
        tmp_path,
        "import",
        "merged",
        "--out",
        "again",
        *(("--offsets", "3", "--kind", "recursive") * ("unrolled" in name)),
    )
    assert acceptance(tmp_path, "again") == pytest.approx(acceptance(tmp_path, "run"), rel=0.02)


@pytest.mark.timeout(600)
def test_low_rank_updates_of_trunk_and_heads_go_into_a_new_folder_only(tmp_path: Path) -> None:
    """They change the trunk, so the folder's own is another one: refused by name, and `hf_mtp` holds both."""
    case = CASES["DeepSeek-V3"]
    write(tmp_path / "hf", case)
    lora = "adapt.lora={rank: 4, in_heads: true, targets: [q, v, up]}"
    trained(tmp_path, case._replace(overrides=(lora,)))
    refused = mtp("export", "run", "--merge-into", "hf", "--out", "merged", cwd=tmp_path)
    assert refused.returncode != 0
    assert "heads must stand on the weights of the folder" in refused.stdout + refused.stderr
    assert not (tmp_path / "merged").exists()
    assert "Verified" in done(tmp_path, "export", "run", "--format", "hf_mtp", "--out", "new", "--verify")
