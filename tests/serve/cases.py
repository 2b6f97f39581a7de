"""What is exported and served: tiny trained models of every head kind that a layout of an engine can hold."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from mtp_lightning.checkpoint.export.drafters import DRAFTER
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.decode import generate
from mtp_lightning.losses.targets import shifted_targets
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.draft_vocabulary import packed_ids
from tests.checkpoint.runs import save_run
from tests.serve.predicted import counts_of_all_ids, predicted_counts, reapplied_counts
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe

LLAMA: dict[str, object] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 192,
    "vocab_size": 64,
    "initializer_range": 0.1,
    "max_position_embeddings": 256,
}
QWEN2 = LLAMA | {"family": "qwen2", "qkv_bias": True}
TIED = QWEN2 | {"tie_word_embeddings": True}
QWEN3 = LLAMA | {"family": "qwen3", "qk_norm": True, "head_dim": 64}
SCALED = LLAMA | {"rope_scaling": {"factor": 4.0, "original_positions": 32}}
TRAINED_STEPS, WIDTH, NUM_TOKENS = 60, 40, 48
Predicts = Callable[[MtpModel, list[int], list[int], int, int], list[int]]


@dataclass(frozen=True)
class Case:
    """One exported model."""

    layout: str
    heads: dict[str, Any]
    model: dict[str, object]
    num_drafts: int
    predicts: Predicts = predicted_counts

    @property
    def recipe(self) -> Recipe:
        """Its recipe."""
        heads = self.heads | {"layers_from_trunk": False}
        return tiny_recipe(heads=heads, model=self.model, data={"seq_len": WIDTH})

    def speculative(self, folder: Path) -> dict[str, Any] | None:
        """What vLLM is told of the drafts."""
        how: dict[str, dict[str, Any]] = {
            "mimo": {"method": "mtp"},
            "qwen3_5": {"method": "mtp"},
            "eagle": {"method": "eagle3", "model": str(folder / DRAFTER)},
            "medusa": {"method": "medusa", "model": str(folder / DRAFTER)},
        }
        return how[self.layout] | {"num_speculative_tokens": self.num_drafts} if self.num_drafts else None


FEWER: dict[str, object] = {
    "draft_vocabulary": 43,
    "draft_token_ids": packed_ids(token for token in range(64) if token % 3 != 2),
}
PRE_NORM = HEAD_KINDS["sequential_pre_norm"]
CASES: dict[str, Case] = {
    "trunk": Case("trunk", {"num_offsets": 3}, SCALED, 0),
    "mimo": Case("mimo", PRE_NORM | {"num_offsets": 3}, LLAMA, 1),
    "mimo_recursive_tied": Case("mimo", {"kind": "recursive", "hidden": "pre_norm", "num_offsets": 3}, TIED, 1),
    "qwen3_5_recursive": Case("qwen3_5", {"kind": "recursive", "num_offsets": 4}, QWEN3, 3, reapplied_counts),
    "qwen3_5_sequential": Case("qwen3_5", {"kind": "sequential", "num_offsets": 3}, QWEN3, 1),
    "qwen3_5_folded": Case("qwen3_5", PRE_NORM | {"num_offsets": 2}, QWEN3, 1),
    "eagle_parallel": Case("eagle", {"kind": "parallel", "num_offsets": 3}, LLAMA, 1),
    "eagle_parallel_scaled": Case("eagle", {"kind": "parallel", "num_offsets": 2}, SCALED, 1),
    "eagle_parallel_qwen2": Case(
        "eagle", {"kind": "parallel", "num_offsets": 2, "layers_per_head": 2, "unembedding": "replicated"}, QWEN2, 1
    ),
    "eagle_causal": Case("eagle", {"kind": "chained", "order": "causal", "num_offsets": 3}, LLAMA, 1),
    "eagle_anticausal_qwen3": Case("eagle", {"kind": "chained", "order": "anticausal", "num_offsets": 3}, QWEN3, 1),
    "eagle_linear_qwen3": Case("eagle", {"kind": "linear", "num_offsets": 3}, QWEN3, 1),
    "eagle_parallel_fewer_ids": Case("eagle", {"kind": "parallel", "num_offsets": 3} | FEWER, LLAMA, 1),
    "eagle_linear_fewer_ids": Case("eagle", {"kind": "linear", "num_offsets": 3} | FEWER, QWEN3, 1),
    "medusa_fewer_ids": Case("medusa", {"kind": "medusa", "num_offsets": 4} | FEWER, LLAMA, 3, counts_of_all_ids),
    "medusa_linear_fewer_ids": Case(
        "medusa", {"kind": "linear", "num_offsets": 4} | FEWER, QWEN3, 3, counts_of_all_ids
    ),
    "medusa": Case("medusa", {"kind": "medusa", "num_offsets": 4}, LLAMA, 3),
    "medusa_replicated": Case(
        "medusa", {"kind": "medusa", "num_offsets": 3, "layers_per_head": 2, "unembedding": "replicated"}, QWEN2, 2
    ),
    "medusa_linear": Case("medusa", {"kind": "linear", "num_offsets": 4}, QWEN3, 3),
}


def trained_model(recipe: Recipe) -> tuple[MtpModel, list[list[int]]]:
    """Train a model a little on texts of repeated words, so that its heads are often right, and often not.

    Returns:
        The model, and prompts of several lengths.
    """
    model, num_offsets = tiny_model(recipe, torch.float32), recipe.heads.num_offsets
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(recipe.model.vocab_size, (12, 5), generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(TRAINED_STEPS):
        rows = words[torch.randint(12, (8, 9), generator=generator)].flatten(1)[:, : WIDTH + num_offsets]
        targets = shifted_targets(rows, torch.zeros_like(rows), num_offsets)
        losses = [
            functional.cross_entropy(
                model.unembedding.all_logits(offset, state).flatten(0, 1), targets[offset - 1].flatten()
            )
            for offset, state in model.hidden_states(rows, torch.zeros_like(rows)).items()
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    prompts = [words[row % 12].tolist() + words[(row * 5 + 1) % 12].tolist()[: row % 4 + 1] for row in range(8)]
    return model.eval().requires_grad_(requires_grad=False), prompts


def exported_job(case: Case, folder: Path) -> dict[str, Any]:
    """Train and export a case: a job for `run_vllm.py`, with what is expected of it."""
    recipe = case.recipe
    model, prompts = trained_model(recipe)
    save_run(folder / "run", recipe, 1, model=model)
    export_model(folder / "run", folder / "served", case.layout)
    more = NUM_TOKENS + recipe.heads.num_offsets
    texts = generate(model, prompts, decoder="greedy", max_new_tokens=more).tokens
    counts = [
        case.predicts(model, prompt, [*prompt, *text], NUM_TOKENS, case.num_drafts)
        for prompt, text in zip(prompts, texts, strict=True)
        if case.num_drafts
    ]
    return {
        "folder": str(folder / "served"),
        "speculative": case.speculative(folder / "served"),
        "prompts": prompts,
        "num_tokens": NUM_TOKENS,
        "expected": {"texts": [text[:NUM_TOKENS] for text in texts], "accepted": counts},
    }
