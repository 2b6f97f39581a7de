"""The cells of `mtp doctor --strategies`: ways of training to compare with plain torch, and a tiny recipe of each."""

import json
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mtp_lightning.recipe.schema.root import Recipe

STEPS = {"sgd": 3, "adamw": 20, "muon": 3}
ROWS = 12  # of a global batch: divisible by all numbers of ranks times micro-batches
CLIP_NORM = 0.5  # below every norm that occurs
RANKS = (1, 2)
STAGES = ("zero1", "zero2", "zero3")
BACKWARD_ORDERS = ("sequential", "bridged", "joint")
HEADS: dict[str, dict[str, Any]] = {
    "parallel": {"kind": "parallel"},
    "chained": {"kind": "chained", "order": "causal"},
    "sequential": {"kind": "sequential"},
}
ADAPTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "low-rank updates": {"adapt": {"lora": {"rank": 2}}},
    "frozen trunk": {"freeze": ["trunk", "unembedding"]},
    "mixtures of a trained trunk": {"adapt": {"layer_mix": {}}},
    "mixtures of layers": {
        "adapt": {"layer_mix": {"temperature": 0.5}, "lora": {"rank": 2}},
        "freeze": ["unembedding"],
    },
    "recomputed in tiles": {"memory": {"recompute_trunk": True, "mlp_tile": 3, "offload_activations": True}},
}
UNEMBEDDINGS = ("shared", "tied", "replicated")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of strategy, backward order and model."""

    stage: str
    ranks: int
    backward_order: str
    accumulation: int  # micro-batches of a rank per step
    heads: str
    unembedding: str
    clips: bool
    optimizer: str = "sgd"
    adaptation: str = "none"
    sequence_parallel: int = 1  # ranks that share windows
    settings: str = ""  # of a model of transformers in the place of one of ours, as JSON
    device: str = "cpu"

    def __str__(self) -> str:
        clips = "clipped" if self.clips else "unclipped"
        rest = f"{self.heads} heads, {self.unembedding} unembedding, {self.accumulation} per step, {clips}"
        noun = "rank" if self.ranks == 1 else "ranks"
        adapted = "" if self.adaptation == "none" else f", {self.adaptation}"
        shared = f" share windows by {self.sequence_parallel}" if self.sequence_parallel > 1 else ""
        place = f"{self.stage}, {self.ranks} {noun}{shared}, {self.backward_order}"
        return f"{place}: {rest}, {self.optimizer}{adapted}"

    @property
    def recipe(self) -> Recipe:
        """A recipe of a few thousand parameters."""
        return Recipe.model_validate(
            {
                "model": {"family": "transformers", "hf_config": json.loads(self.settings)}
                if self.settings
                else {
                    "hidden_size": 16,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "intermediate_size": 24,
                    "vocab_size": 29,
                    "initializer_range": 0.1,
                    "tie_word_embeddings": self.unembedding == "tied",
                },
                "heads": {
                    **HEADS[self.heads],
                    "num_offsets": 3,
                    "unembedding": "replicated" if self.unembedding == "replicated" else "shared",
                    "layers_from_trunk": self.adaptation == "none"
                    and not self.settings,  # else the trunk keeps layers to choose from
                },
                **ADAPTATIONS[self.adaptation],
                "objective": {
                    "backward_order": self.backward_order,
                    "chunk_mib": 11 * 29 * 4 / 2**20,
                },  # 11 rows: ragged chunks
                "data": {"seq_len": 10},
                "batch": {
                    "global_batch_size": ROWS,
                    "micro_batch_size": ROWS * self.sequence_parallel // (self.ranks * self.accumulation),
                },
                "optimizer": {
                    "kind": "muon" if self.optimizer == "muon" else "adamw",
                    "lr": 0.1 if self.optimizer == "sgd" else 3e-3,
                    "warmup_steps": 0,
                    "min_lr_ratio": 1.0,
                    "max_grad_norm": CLIP_NORM if self.clips else None,
                },
                "run": {"steps": STEPS[self.optimizer], "device": self.device, "threads": 1},
                "logging": {"every_steps": 1},
                "strategy": {
                    "kind": self.stage,
                    "ranks_per_node": self.ranks,
                    "sequence_parallel": self.sequence_parallel,
                    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
                },
            }
        )


def sample() -> list[Cell]:
    """List a few cells in which every two values meet that can: a plain one of each stage, ranks and backward order.

    AdamW and Muon meet every stage and number of ranks, adaptations every stage, backward order and number of ranks.
    """
    cells: list[Cell] = []
    for (s, stage), (r, ranks), (k, backward_order) in product(
        enumerate(STAGES), enumerate(RANKS), enumerate(BACKWARD_ORDERS)
    ):
        heads, unembedding = [*HEADS][(s + k) % 3], UNEMBEDDINGS[(s + 2 * k + r) % 3]
        plain = Cell(
            stage=stage,
            ranks=ranks,
            backward_order=backward_order,
            accumulation=(1, 3)[(r + k) % 2],
            heads=heads,
            unembedding="shared" if (heads, unembedding) == ("sequential", "replicated") else unembedding,
            clips=bool((s + r) % 2),
        )
        others = [name for number, name in enumerate(("adamw", "muon")) if (s + r + k) % 3 == number]
        cells += [plain, *(replace(plain, optimizer=name) for name in others)]
        adapted = [name for number, name in enumerate(ADAPTATIONS) if (number + s + k) % 3 == (number + s + r) % 2 == 0]
        cells += [adapted_cell(stage, ranks, backward_order, name) for name in adapted if name != "none"]
    return cells


def adapted_cell(stage: str, ranks: int, backward_order: str, adaptation: str) -> Cell:
    """Return the cell of an adapted model."""
    where: dict[str, Any] = {"stage": stage, "ranks": ranks, "backward_order": backward_order, "adaptation": adaptation}
    return Cell(**where, accumulation=3, heads="parallel", unembedding="shared", clips=True)
