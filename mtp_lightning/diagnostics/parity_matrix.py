"""The ways of training that are held against plain torch, and a tiny recipe of each."""

from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations, product
from typing import Any

from mtp_lightning.recipe.schema.root import Recipe

STEPS = {"sgd": 3, "adamw": 20}
ROWS = 12  # of a global batch: divisible by all numbers of ranks times micro-batches
CLIP_NORM = 0.5  # below every norm that occurs
RANKS = (1, 2)
STAGES = ("zero1", "zero2", "zero3")
SCHEDULES = ("sequential", "bridged", "joint")
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
}
UNEMBEDDINGS = ("shared", "tied", "replicated")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of training."""

    stage: str
    ranks: int
    schedule: str
    accumulation: int  # micro-batches of a rank per step
    heads: str
    unembedding: str
    clips: bool
    optimizer: str = "sgd"
    adaptation: str = "none"

    def __str__(self) -> str:
        clips = "clipped" if self.clips else "unclipped"
        rest = f"{self.heads} heads, {self.unembedding} unembedding, {self.accumulation} per step, {clips}"
        noun = "rank" if self.ranks == 1 else "ranks"
        adapted = "" if self.adaptation == "none" else f", {self.adaptation}"
        return f"{self.stage}, {self.ranks} {noun}, {self.schedule}: {rest}, {self.optimizer}{adapted}"

    @property
    def recipe(self) -> Recipe:
        """A recipe of a few thousand parameters."""
        return Recipe.model_validate(
            {
                "model": {
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
                    "layers_from_trunk": self.adaptation == "none",  # else the trunk keeps layers to choose from
                },
                **ADAPTATIONS[self.adaptation],
                "objective": {
                    "backward_order": self.schedule,
                    "chunk_mib": 11 * 29 * 4 / 2**20,
                },  # 11 rows: ragged chunks
                "data": {"seq_len": 10},
                "batch": {"global_batch_size": ROWS, "micro_batch_size": ROWS // (self.ranks * self.accumulation)},
                "optimizer": {
                    "lr": 0.1 if self.optimizer == "sgd" else 3e-3,
                    "warmup_steps": 0,
                    "min_lr_ratio": 1.0,
                    "max_grad_norm": CLIP_NORM if self.clips else None,
                },
                "run": {"steps": STEPS[self.optimizer], "device": "cpu", "threads": 1},
                "logging": {"every_steps": 1},
                "strategy": {
                    "kind": self.stage,
                    "ranks_per_node": self.ranks,
                    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
                },
            }
        )


def matrix(num_ranks: int, *, full: bool) -> list[Cell]:
    """List the cells of a number of ranks: all, or a sample in which every three values meet that can."""
    chosen = [cell for cell in (_every_cell() if full else sample()) if cell.ranks == num_ranks]
    cells: list[Cell] = []
    for stage, schedule in product(STAGES, SCHEDULES):
        row = [cell for cell in chosen if (cell.stage, cell.schedule) == (stage, schedule)]
        curves = row[::8] if full else row[: schedule == SCHEDULES[0]]
        cells += row + [replace(cell, optimizer="adamw") for cell in curves]
        cells += _adapted(stage, schedule, num_ranks, full=full)
    return cells


def _every_cell() -> list[Cell]:
    """List every combination that there is, of models that are not adapted."""
    names = ("stage", "ranks", "schedule", "heads", "unembedding", "accumulation", "clips")
    return [
        Cell(**dict(zip(names, values, strict=True)))
        for values in product(STAGES, RANKS, SCHEDULES, HEADS, UNEMBEDDINGS, (1, 3), (False, True))
        if values[3:5] != ("sequential", "replicated")
    ]


@cache
def sample() -> tuple[Cell, ...]:
    """Choose cells until all triples of values have met that meet in any cell: each time the one with most new ones."""
    triples = {cell: set(combinations(_values(cell), 3)) for cell in _every_cell()}
    missing, chosen = set[Any]().union(*triples.values()), []
    while missing:
        best = max(triples, key=lambda cell: len(triples[cell] & missing))
        missing -= triples[best]
        chosen.append(best)
    return tuple(chosen)


def _values(cell: Cell) -> list[tuple[str, Any]]:
    return [(field.name, getattr(cell, field.name)) for field in fields(cell)]


def _adapted(stage: str, schedule: str, num_ranks: int, *, full: bool) -> list[Cell]:
    """List cells of adapted models: every stage, schedule and adaptation; in the sample every two of these meet."""
    names = [name for name in ADAPTATIONS if name != "none"]
    return [
        Cell(
            stage=stage,
            ranks=num_ranks,
            schedule=schedule,
            accumulation=3,
            heads="parallel",
            unembedding="shared",
            clips=True,
            adaptation=name,
        )
        for number, name in enumerate(names)
        if full or (number + STAGES.index(stage) + SCHEDULES.index(schedule)) % len(SCHEDULES) == 0
    ]
