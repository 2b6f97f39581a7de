"""Predict the MFU of recipes on an H100 by a roofline over the kernels of a step.

    python -m tests.support.fake_cuda.predict recipes/paper/0.3b_n1.yaml recipes/paper/0.3b_n4.yaml [KEY=VALUE...]

Each kernel of eager torch takes as long as its bytes or its operations do at the rates of `ledger.py`. A second figure
is for `memory.compile=true`: elementwise work of layers moves what `compiled_layer` counts, scores in the loss what the
planner says. What ranks exchange and the optimizer are not in it (`mtp plan` has both).
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.planner.flops import flops_per_position
from mtp_lightning.planner.throughput import COMPILED_LOGIT_BYTES, LOGIT_BYTES
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.fake_cuda.client import FakeCuda, fake_cuda
from tests.support.fake_cuda.ledger import BYTES_PER_S

PEAK_FLOPS_PER_S = 989e12
FIELDS = ["data.shards=none", "run.steps=2", "logging.every_steps=9", "run.validate_every_steps=9"]
FORWARD_BYTES, BACKWARD_BYTES = 55.6, 99.3  # of a compiled layer, per position and channel: `compiled_layer`


def micro_batch(ask: FakeCuda, path: str, overrides: list[str]) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe and what is in the books of a step of one micro-batch."""
    recipe = load_recipe(Path(path), [*FIELDS, *overrides]).recipe
    rows = recipe.batch.micro_batch_size * recipe.strategy.num_ranks
    fields = [*FIELDS, *overrides, f"batch.global_batch_size={rows}"]
    return recipe, ask(
        "fit", path=str(Path(path).resolve()), overrides=fields, checks_first_step=False, breaks_off=True
    )


def predict(ask: FakeCuda, path: str, overrides: list[str]) -> tuple[Recipe, Counter[str], Counter[str], int]:
    """Return the recipe, seconds of a micro-batch by kind (losses apart) and by line, and its launches."""
    recipe, books = micro_batch(ask, path, overrides)
    by_kind, by_line = Counter[str](), Counter[str]()
    for name, seconds in books["seconds"][0].items():
        kind, _, line = name.partition(" ")
        of_loss = line.startswith("losses/")
        kind = "update" if line.startswith("training/strategies/") else kind  # once in a step
        by_kind[f"loss, {kind}" if of_loss else kind] += seconds
        by_line[f"{line} ({kind})"] += seconds
    return recipe, by_kind, by_line, sum(books["launches"][0].values())


def compiled_s(recipe: Recipe, kinds: Counter[str], positions: int) -> float:
    """Seconds of a micro-batch whose layers and loss are compiled."""
    layers, trunk = recipe.model.num_hidden_layers, recipe.model.num_hidden_layers - recipe.heads.num_offsets
    per_channel = (FORWARD_BYTES + BACKWARD_BYTES) * layers + FORWARD_BYTES * trunk * recipe.memory.recompute_trunk
    moved = per_channel * positions * recipe.model.hidden_size
    moved += 6 * parameter_counts(recipe).total  # gradients in bf16, added to those of the other passes
    saved = (LOGIT_BYTES - COMPILED_LOGIT_BYTES) * positions * recipe.model.vocab_size * recipe.heads.num_offsets
    kept = sum(seconds for kind, seconds in kinds.items() if kind not in ("elementwise", "update"))
    return kept + (moved - saved) / BYTES_PER_S


def main(arguments: list[str]) -> None:
    """Print a row for every recipe."""
    paths, overrides = ([own for own in arguments if ("=" in own) == is_field] for is_field in (False, True))
    with fake_cuda() as ask:
        for path in paths:
            recipe, kinds, lines, launches = predict(ask, path, overrides)
            positions = recipe.batch.micro_batch_size * recipe.data.seq_len
            operations = flops_per_position(recipe) * positions
            eager = sum(seconds for kind, seconds in kinds.items() if kind != "update")
            print(f"{recipe.name}: {positions} positions, {operations / 1e12:.1f} TFLOP, {launches} launches")
            for name, seconds in (("eager", eager), ("compiled", compiled_s(recipe, kinds, positions))):
                print(f"  {name}: {1e3 * seconds:.1f} ms, MFU {operations / seconds / PEAK_FLOPS_PER_S:.1%}")
            print(f"  ms: {', '.join(f'{kind} {1e3 * kinds[kind]:.1f}' for kind in sorted(kinds))}")
            for line, own in lines.most_common(14):
                print(f"    {1e3 * own:8.2f} ms  {line}")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
