"""Healthy configurations of training, drawn by a seed, and short runs of them with all checks of a run."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mtp_lightning import MtpDataModule, MtpLightningModule, load_recipe
from mtp_lightning.data.shards.build import BuildOptions, build_shards
from mtp_lightning.errors import RecipeError
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.runs import ROOT
from tests.support.tiny import HEAD_KINDS, NEOX

SMALL = {
    "model": {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 24},
    "run": {"threads": 1, "steps": 3, "validation_samples": 1, "validate_every_steps": 1000},
}
FREEZES = ([], [], [], ["trunk"], ["heads"], ["unembedding"], ["offsets_below_3"], ["trunk", "unembedding"])
WEIGHTS = (
    {"kind": "constant"},
    {"kind": "decay", "beta": 0.5},
    {"kind": "lambda", "start": 0.3, "end": 0.0},
    {"kind": "curriculum"},
    {"kind": "curriculum", "direction": "reverse"},
)
CHANGES = ("none", "none", "large norms", "zero blocks", "large and zero", "small")


def make_data(folder: Path) -> dict[str, str]:
    """Make shards of text, and of long prompts with answers of a few bytes."""
    (folder / "text").mkdir()
    for number in range(40):
        (folder / f"text/{number}.txt").write_text(f"some text of number {number} that goes on. " * 12)
    lines = [json.dumps({"prompt": f"question {k} " * 40, "completion": "ok"}) for k in range(200)]
    (folder / "answers.jsonl").write_text("\n".join(lines))
    for name, source in {"text": "text", "answers": "answers.jsonl"}.items():
        options = BuildOptions(validation_fraction=0.2)
        build_shards([str(folder / source)], folder / f"{name}-shards", options, processes=1)
    return {name: str(folder / f"{name}-shards") for name in ("text", "answers")}


def draw(seed: int, data: dict[str, str], **fixed: Any) -> tuple[Recipe, str]:
    """Draw a valid recipe and a change of its first weights."""
    rng = random.Random(seed)
    while True:
        heads: dict[str, Any] = {**rng.choice(list(HEAD_KINDS.values())), "num_offsets": rng.choice((2, 3, 4))}
        heads["detach_trunk"] = rng.random() < 0.1
        micro, passes = rng.choice((1, 2)), rng.choice((1, 2, 3))
        sections = {
            "model": SMALL["model"]
            | {"tie_word_embeddings": rng.random() < 0.3, "qkv_bias": rng.random() < 0.3, "qk_norm": rng.random() < 0.3}
            | {"initializer_range": rng.choice((0.002, 0.02, 0.2)), **(NEOX if rng.random() < 0.2 else {})},
            "heads": heads,
            "freeze": rng.choice(FREEZES),
            "adapt": {
                "lora": {"rank": 2, "in_heads": rng.random() < 0.3} if rng.random() < 0.2 else None,
                "layer_mix": {} if rng.random() < 0.15 else None,
            },
            "objective": {
                "weights": rng.choice(WEIGHTS),
                "backward_order": rng.choice(("sequential", "bridged", "joint")),
                "balance": rng.choice(("none", "none", "rms")),
                "distill": {} if rng.random() < 0.2 else None,
            },
            "data": {"shards": data[rng.choice(list(data))], "seq_len": rng.choice((8, 16, 48))},
            "batch": {"micro_batch_size": micro, "global_batch_size": micro * passes},
            "optimizer": {
                "lr": 10 ** rng.uniform(-9, -2),
                "warmup_steps": rng.choice((0, 1, 10, 2000)),
                "min_lr_ratio": rng.choice((0.0, 0.1)),
                "weight_decay": rng.choice((0.0, 0.1)),
                "max_grad_norm": rng.choice((None, 1.0, 1e-3)),
            },
            "run": SMALL["run"] | {"precision": rng.choice(("fp32", "bf16")), "seed": seed},
            "memory": {"recompute_trunk": rng.random() < 0.2},
        }
        if sections["freeze"] == ["trunk", "unembedding"]:  # the main head alone, as other weights begin or end with
            sections["objective"]["weights"] = WEIGHTS[rng.randrange(2)]
        change = rng.choice(CHANGES)
        try:
            return load_recipe(ROOT / "recipes/debug/base.yaml", as_fields(sections | fixed)).recipe, change
        except RecipeError:
            continue


def as_fields(sections: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in sections.items()]


class Changed(L.Callback):
    """Changes weights before the first step, to what a pretrained model may have."""

    def __init__(self, change: str, rng: random.Random) -> None:
        self.change, self.rng = change, rng

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.model.named_parameters():
            if "large" in self.change and parameter.dim() == 1 and not name.endswith("bias"):
                parameter.mul_(self.rng.choice((4.0, 8.0, 64.0)))
            ends_a_block = name.endswith(("o_proj.weight", "down_proj.weight"))
            if "zero" in self.change and ends_a_block and self.rng.random() < 0.4:
                parameter.zero_()
            if self.change == "small":
                parameter.mul_(1e-2)


def fit(recipe: Recipe, change: str, *callbacks: L.Callback, module: MtpLightningModule | None = None) -> None:
    """Train as a recipe says, on the CPU and without files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.seed_everything(recipe.run.seed, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Changed(change, random.Random(recipe.run.seed)), *callbacks],
        )
        module = module or MtpLightningModule(recipe)
        trainer.fit(module, datamodule=MtpDataModule(recipe))
