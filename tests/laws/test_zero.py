"""Law 1 under ZeRO: what reaches the optimizer on real ranks = plain torch, for every stage, order and head kind."""

import json
import re
from dataclasses import replace
from itertools import product

import pytest

from mtp_lightning.diagnostics.parity import LOSS_TOLERANCE, TOLERANCE, compare_strategies
from mtp_lightning.diagnostics.parity_matrix import ADAPTATIONS, BACKWARD_ORDERS, RANKS, STAGES, Cell, sample
from tests.support import warm
from tests.support.architectures import settings_of
from tests.support.parity_matrix import plain_cells, sample_of_triples, values_of, whole_matrix
from tests.support.ranked import on_ranks
from tests.support.runs import ROOT, mtp

ROW = re.compile(r"^(zero\d) +(\d) +(\w+) +(\d+) +(\S+) +(\S+) +(\S+)$", re.MULTILINE)


def test_every_stage_and_every_backward_order_is_equal_on_two_ranks(warm_ranks):
    """The slow tests run all pairs of values, and all triples."""
    chosen = {("zero1", "bridged"), ("zero2", "joint"), ("zero3", "sequential")}
    cells = [
        cell
        for cell in sample()
        if (cell.ranks, cell.optimizer, cell.adaptation) == (2, "sgd", "none")
        and (cell.stage, cell.backward_order) in chosen
    ]
    assert len(cells) == len(chosen)
    assert [cell.stage for cell in cells] == [*STAGES]
    cells.append(replace(cells[1], sequence_parallel=2, adaptation="recomputed in tiles"))
    cells.append(replace(cells[2], optimizer="muon"))
    outcomes = compare_strategies(cells)
    assert [outcome.cell for outcome in outcomes] == cells
    assert [outcome for outcome in outcomes if not outcome.is_good or not outcome.error] == []


@pytest.mark.slow
def test_a_sample_of_the_matrix():
    done = mtp("doctor", "--strategies", cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = ROW.findall(done.stdout)
    assert {(stage, int(ranks), backward_order) for stage, ranks, backward_order, *_ in rows} == {
        (stage, ranks, backward_order) for stage in STAGES for ranks in RANKS for backward_order in BACKWARD_ORDERS
    }
    for *_, gradients, weights, losses in rows:
        assert 0 < float(gradients) <= TOLERANCE
        assert 0 < float(weights) <= TOLERANCE
        assert 0 < float(losses) <= LOSS_TOLERANCE
    assert sum(int(num_cells) for *_, num_cells, _, _, _ in rows) >= 2 * len(rows)


def all_values(cells, number):
    return {values for cell in cells for values in values_of(cell, number)}


def test_the_whole_matrix_is_every_combination():
    every = {cell for cell in whole_matrix() if cell.optimizer == "sgd"}
    cells = {cell for cell in every if cell.adaptation == "none"}
    assert len(every - cells) == len(STAGES) * len(RANKS) * len(BACKWARD_ORDERS) * (len(ADAPTATIONS) - 1)
    heads_and_unembeddings = 3 * 3 - 1  # sequential heads share their unembedding
    assert len(cells) == len(STAGES) * len(RANKS) * len(BACKWARD_ORDERS) * 2 * heads_and_unembeddings * 2


def test_in_the_sample_every_two_values_meet_that_can():
    plain = [cell for cell in sample() if (cell.optimizer, cell.adaptation) == ("sgd", "none")]
    assert all_values(plain, 2) == all_values(plain_cells(), 2)
    places = {(cell.stage, cell.ranks, cell.backward_order) for cell in plain}
    assert places == set(product(STAGES, RANKS, BACKWARD_ORDERS))
    adapted = {(cell.adaptation, value) for cell in sample() for value in (cell.stage, cell.backward_order, cell.ranks)}
    assert adapted >= set(product(ADAPTATIONS, (*STAGES, *BACKWARD_ORDERS, *RANKS)))
    for name in ("adamw", "muon"):
        met = {(cell.stage, cell.ranks) for cell in sample() if cell.optimizer == name}
        assert met == set(product(STAGES, RANKS))
    assert len(set(sample())) == len(sample()) <= 46


@pytest.mark.matrix
def test_in_the_sample_of_triples_every_three_values_meet_that_can():
    whole, part = plain_cells(), sample_of_triples()
    assert all_values(part, 3) == all_values(whole, 3)
    assert len(part) < len(whole) / 10


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_every_three_values_that_can_meet_are_equal(warm_ranks):
    outcomes = compare_strategies(sample_of_triples())
    assert [outcome for outcome in outcomes if not outcome.is_good] == []
    assert {outcome.cell for outcome in outcomes} == {*sample_of_triples()}


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_the_whole_matrix(warm_ranks):
    outcomes = compare_strategies(whole_matrix())
    assert [outcome for outcome in outcomes if not outcome.is_good] == []
    assert {outcome.cell for outcome in outcomes} == {*whole_matrix()}


@pytest.mark.slow
def test_unequal_cells_are_named_and_fail_the_command():
    """Nothing is as near as this tolerance asks for: rounding itself must be found."""
    code = (
        "from mtp_lightning.diagnostics import parity, parity_matrix; from mtp_lightning.cli.app import main; "
        "parity.TOLERANCE, some = 1e-9, parity_matrix.sample()[:3]; parity_matrix.sample = lambda: some; main()"
    )
    done = warm.run("doctor", "--strategies", cwd=ROOT, code=code, warm_ranks=True)
    assert done.returncode == 1
    assert "cells are not equal" in done.stdout
    assert "zero1, 1 rank, sequential: " in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_frozen_parameters_are_partitioned_again_before_each_step():
    """Low-rank updates under zero3, with recomputation, on two ranks: the frozen model lies in parts between steps."""
    orders = ",".join(BACKWARD_ORDERS)
    found = json.loads(on_ranks("tests.support.frozen_gathered", 2, orders, "0").splitlines()[-1])
    assert found.keys() == set(BACKWARD_ORDERS)
    for outcome in found.values():
        assert outcome["failure"] == ""
        assert 0 < outcome["gradients"] <= TOLERANCE
        assert outcome["frozen"] > 20
        assert outcome["frozen whole"] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_frozen_parameters_that_are_kept_whole_are_seen():
    """The test above can fail."""
    found = json.loads(on_ranks("tests.support.frozen_gathered", 2, "joint", "1000000").splitlines()[-1])
    assert len(found["joint"]["frozen whole"]) == found["joint"]["frozen"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "deepseek_v3", "gpt2"])
def test_decoders_of_transformers_train_alike_under_every_stage(warm_ranks, name):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'mtp_lightning[transformers]'")
    settings = json.dumps(settings_of(name, output_router_logits=False))
    cells = [
        Cell(
            stage=stage,
            ranks=2,
            backward_order=order,
            accumulation=2,
            heads=heads,
            unembedding="shared",
            clips=True,
            settings=settings,
        )
        for stage, order, heads in zip(STAGES, BACKWARD_ORDERS, ("sequential", "parallel", "chained"), strict=True)
    ]
    outcomes = compare_strategies(cells)
    assert [outcome.cell for outcome in outcomes] == cells
    assert [outcome for outcome in outcomes if not outcome.is_good or not outcome.error] == []
