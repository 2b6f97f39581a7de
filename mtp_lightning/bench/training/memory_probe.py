"""Peak memory of one recipe in this process: `python -m mtp_lightning.bench.training.memory_probe`, recipe on stdin.

Started by `memory.py`, a process per figure, with `peak.MALLOC_ENVIRONMENT` set. Prints one line of JSON.
"""

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from mtp_lightning.bench.machine import describe_machine
from mtp_lightning.bench.training.peak_memory import PeakMeter
from mtp_lightning.bench.training.step import TrainingStep
from mtp_lightning.errors import MtpError
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.device import prepare_device


def probe(recipe: Recipe) -> dict[str, Any]:
    """Run a warm-up step, which allocates the optimizer's state, and measure the peak of a second one.

    The step takes predictions, as the steps that are logged do: the peak of a run includes theirs. A tiny model goes
    first, so that what the libraries load and keep for themselves is not counted.
    """
    device = prepare_device(recipe)
    TrainingStep(shrunken(recipe), device).run(recipe.objective.backward_order, predicts=True)
    meter = PeakMeter(device)
    step = TrainingStep(recipe, device)
    step.run(recipe.objective.backward_order, predicts=True)
    meter.reset()
    began_at = time.perf_counter()
    step.run(recipe.objective.backward_order, predicts=True)
    peak_bytes = meter.peak_bytes()
    step_s = time.perf_counter() - began_at
    return {"peak_bytes": peak_bytes, "step_s": step_s, "machine": asdict(describe_machine(device))}


def shrunken(recipe: Recipe) -> Recipe:
    """Make everything small that may be, and leave the code that runs the same."""
    model = {"hidden_size": 64, "head_dim": 2, "intermediate_size": 64, "vocab_size": 64}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update={"seq_len": recipe.heads.num_offsets + 1}),
            "batch": recipe.batch.model_copy(update={"global_batch_size": 1, "micro_batch_size": 1}),
        }
    )


def main() -> int:
    """Read a recipe, print its figures."""
    try:
        result = probe(Recipe.model_validate_json(sys.stdin.read()))
    except MtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
