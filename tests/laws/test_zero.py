"""Law 1 under ZeRO: what reaches the optimizer on real ranks = plain torch, for every stage, schedule and head kind."""

import os
import re
import subprocess
import sys
from itertools import combinations, product

import pytest

from mtp_lightning.diagnostics.parity import LOSS_TOLERANCE, TOLERANCE, compare_strategies
from mtp_lightning.diagnostics.parity_matrix import (
    ADAPTATIONS,
    RANKS,
    SCHEDULES,
    STAGES,
    _every_cell,
    _values,
    matrix,
    sample,
)
from tests.support.runs import ROOT, mtp

ROW = re.compile(r"^(zero\d) +(\d) +(\w+) +(\d+) +(\S+) +(\S+) +(\S+)$", re.MULTILINE)


def test_a_sample_of_the_matrix():
    done = mtp("doctor", "--strategies", cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = ROW.findall(done.stdout)
    assert {(stage, int(ranks), schedule) for stage, ranks, schedule, *_ in rows} == {
        (stage, ranks, schedule) for stage in STAGES for ranks in RANKS for schedule in SCHEDULES
    }
    for *_, gradients, weights, losses in rows:
        assert 0 < float(gradients) <= TOLERANCE
        assert 0 < float(weights) <= TOLERANCE
        assert 0 < float(losses) <= LOSS_TOLERANCE
    assert sum(int(num_cells) for *_, num_cells, _, _, _ in rows) >= 2 * len(rows)


def test_the_whole_matrix_is_every_combination():
    every = {cell for num_ranks in RANKS for cell in matrix(num_ranks, full=True) if cell.optimizer == "sgd"}
    cells = {cell for cell in every if cell.adaptation == "none"}
    assert len(every - cells) == len(STAGES) * len(RANKS) * len(SCHEDULES) * (len(ADAPTATIONS) - 1)
    heads_and_unembeddings = 3 * 3 - 1  # sequential heads share their unembedding
    assert len(cells) == len(STAGES) * len(RANKS) * len(SCHEDULES) * 2 * heads_and_unembeddings * 2


def test_in_the_sample_every_three_values_meet_that_can():
    whole, part = ({cell: _values(cell) for cell in cells} for cells in (_every_cell(), sample()))
    every, found = (
        {triple for values in cells.values() for triple in combinations(values, 3)} for cells in (whole, part)
    )
    assert found == every
    assert len(part) < len(whole) / 10
    cells = [cell for num_ranks in RANKS for cell in matrix(num_ranks, full=False)]
    pairs = {(cell.adaptation, value) for cell in cells for value in (cell.stage, cell.schedule, cell.ranks)}
    assert pairs >= set(product(ADAPTATIONS, (*STAGES, *SCHEDULES, *RANKS)))


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_the_whole_matrix():
    outcomes = compare_strategies(full=True)
    assert [outcome for outcome in outcomes if not outcome.is_good] == []
    assert {outcome.cell for outcome in outcomes} == {c for ranks in RANKS for c in matrix(ranks, full=True)}


@pytest.mark.slow
def test_unequal_cells_are_named_and_fail_the_command():
    """Nothing is as near as this tolerance asks for: rounding itself must be found."""
    code = (
        "from mtp_lightning.diagnostics import parity; parity.TOLERANCE = 1e-9; "
        "from mtp_lightning.cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, "doctor", "--strategies"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert "cells are not equal" in done.stdout
    assert "zero1, 1 rank, sequential: " in done.stdout
