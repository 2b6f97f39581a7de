"""What a step launches and moves, and when the host waits, on a device without memory (`tests/support/fake_cuda`).

Counted are the kernels of eager torch: what Python, autograd and the optimizer hand to the device, and the bytes that
they read and write. No step may launch or move more than is recorded in `tests/golden/launches.json`; UPDATE_GOLDEN=1
records what they do now.
"""

import json
import os

import pytest

from tests.recipe.golden import GOLDEN
from tests.support.fake_cuda.guard import missing
from tests.support.runs import ROOT

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

RECORD = GOLDEN / "launches.json"
SHAPE = ["model.num_hidden_layers=5", "heads.num_offsets=3", "run.precision=bf16"]
PLAIN = ["run.steps=3", "logging.every_steps=3", "run.validate_every_steps=9", "objective.weights.kind=constant"]
RANKS = ["strategy.ranks_per_node=8", "batch.global_batch_size=16", "batch.micro_batch_size=1"]  # two micro-batches
ALONE = ["batch.global_batch_size=16", "batch.micro_batch_size=8"]  # as many
STEPS = {
    "single": ("parallel", [*ALONE, "model.qk_norm=true"]),
    "single, heads that read one another": ("sequential", ALONE),
    "single, documents": ("parallel", [*ALONE, "data.document_mask=true"]),
    "single, recomputed": ("parallel", [*ALONE, "memory.recompute_trunk=true", "memory.recompute_heads=true"]),
    "single, distilled": ("medusa", [*ALONE, "objective.distill={}"]),
    "zero1": ("parallel", ["strategy.kind=zero1", *RANKS]),
    "zero2": ("parallel", ["strategy.kind=zero2", *RANKS]),
    "zero3": ("parallel", ["strategy.kind=zero3", *RANKS]),
}
DAILY = ("single",)
DECODERS = {
    "greedy": ("parallel", {"decoder": "greedy"}),
    "blockwise": ("parallel", {"decoder": "blockwise", "draft_length": 2}),
    "blockwise, four texts": ("medusa", {"decoder": "blockwise", "draft_length": 2, "rows": 4}),
    "blockwise, as many as pay": ("parallel", {"decoder": "blockwise", "draft_length": "adaptive"}),
    "blockwise, drawn": ("parallel", {"decoder": "blockwise", "draft_length": 2, "temperature": 0.8}),
    "chain": ("sequential", {"decoder": "chain", "draft_length": 2}),
    "chain, drawn": (
        "sequential",
        {"decoder": "chain", "draft_length": 2, "temperature": 0.8, "top_k": 50, "sample_drafts": True},
    ),
    "tree": ("parallel", {"decoder": "tree"}),
    "greedy, fixed shapes": ("parallel", {"decoder": "greedy", "compile": True}),
    "blockwise, fixed shapes": ("parallel", {"decoder": "blockwise", "draft_length": 2, "compile": True}),
    "chain, fixed shapes, drawn": (
        "sequential",
        {"decoder": "chain", "draft_length": 2, "compile": True, "temperature": 0.8, "sample_drafts": True},
    ),
    "tree, drawn": ("parallel", {"decoder": "tree", "temperature": 0.8}),
}


def check(group, name, books):
    """Compare launches and bytes with what is recorded."""
    budgets = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    found = {"launches": sum(books["launches"].values()), "bytes": sum(books["moved"].values())}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        budgets.setdefault(group, {})[name] = found
        RECORD.write_text(json.dumps(budgets, indent=2, sort_keys=True) + "\n")
    budget = budgets.get(group, {}).get(name)
    assert budget is not None, f"{group}, {name} must be recorded: UPDATE_GOLDEN=1 pytest {__file__}"
    for what, by_line in (("launches", books["launches"]), ("bytes", books["moved"])):
        most = sorted(by_line.items(), key=lambda item: -item[1])[:12]
        assert found[what] <= budget[what], f"{name}: {found[what]} {what}, {budget[what]} are recorded; most at {most}"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in STEPS]
)
def test_a_training_step_launches_no_more_than_is_recorded(gpu, name):
    recipe, fields = STEPS[name]
    path = str(ROOT / f"recipes/debug/{recipe}.yaml")
    books = gpu("fit", path=path, overrides=[*SHAPE, *PLAIN, *fields], checks_first_step=False)
    check("training", name, {"launches": books["launches"][1], "moved": books["moved"][1]})


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_of_decoding_launches_no_more_than_is_recorded_and_waits_once(gpu, name):
    recipe, settings = DECODERS[name]
    books = gpu("decode", path=str(ROOT / f"recipes/debug/{recipe}.yaml"), overrides=SHAPE, **settings)
    waits = "decode/static.py take" if settings.get("compile") else "decode/state.py note_progress"
    assert books["waits"] == {f"copy to cpu {waits}": 1}
    check("decoding", name, books)
