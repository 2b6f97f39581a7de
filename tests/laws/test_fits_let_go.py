"""What a fit holds is let go when it ends; and what DeepSpeed computes in is what the recipe says.

Without a GPU: types and loss scale of fp16, and the paths of offloading, run on CPU ranks as they are.
"""

import json
import math

import pytest

from mtp_lightning.diagnostics.parity import TOLERANCE
from tests.support.ranked import on_ranks

CELLS = {"zero1:bf16": 3, "zero2:bf16": 3, "zero3:bf16": 3}  # how many fits begin after another
SMALL_BYTES = 2**14  # counters and generators; the model alone has 2^20


def last_line(text):
    return json.loads(text.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "cells"),
    [(1, {"single:fp32": 2, **CELLS}), (2, {"zero2:fp32": 2, **CELLS})],
    ids=["1", "2"],
)
def test_nothing_of_a_fit_is_alive_when_the_next_begins(tmp_path, num_ranks, cells):
    """Of a run with a rollback and of its second phase, and of the run before."""
    outcome = last_line(on_ranks("tests.support.lasting_engines", num_ranks, str(tmp_path), ",".join(cells)))
    assert {cell: len(fits) for cell, fits in outcome.items()} == cells
    left = {cell: [names for names, _ in fits] for cell, fits in outcome.items()}
    assert left == {cell: [[]] * count for cell, count in cells.items()}
    assert max(live_bytes for fits in outcome.values() for _, live_bytes in fits) < SMALL_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_fp16_has_a_loss_scale_and_offloading_changes_nothing(num_ranks):
    fp16 = [f"{stage}:fp16:none:none" for stage in ("zero1", "zero2", "zero3")]
    offloaded = ["zero2:fp32:cpu:none", "zero3:fp32:cpu:none", "zero3:fp32:cpu:cpu", "zero3:bf16:cpu:cpu"]
    plain, overflow = "zero3:bf16:none:none", [f"{stage}:overflow:none:none" for stage in ("zero1", "zero2", "zero3")]
    outcome = last_line(
        on_ranks("tests.support.cpu_as_gpu", num_ranks, ",".join([*fp16, *offloaded, plain, *overflow]))
    )
    for cell in fp16:
        assert outcome[cell]["failure"] == ""
        assert outcome[cell]["types"] == ["torch.float16"]
        assert set(outcome[cell]["scales"]) == {2.0**16}
        assert 0 < outcome[cell]["weights"] < 1e-3
    for cell in offloaded[:3]:
        assert outcome[cell]["failure"] == ""
        assert 0 < outcome[cell]["gradients"] <= TOLERANCE
        assert 0 < outcome[cell]["weights"] <= TOLERANCE
    in_bf16, there = outcome[offloaded[3]], outcome[plain]
    assert in_bf16["types"] == there["types"] == ["torch.bfloat16"]
    assert math.isclose(in_bf16["gradients"], there["gradients"], rel_tol=1e-6)
    for cell in overflow:
        scales, skipped = outcome[cell]
        assert scales == sorted(scales, reverse=True)
        assert 0 < skipped < len(scales)  # it was found
        assert scales[0] > scales[-1] > 1
