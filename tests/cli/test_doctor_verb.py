"""`mtp doctor`: what the machine has, and how a comparison of strategies is shown."""

import math

import pytest
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.cli.doctor import print_outcomes
from mtp_lightning.diagnostics.parity import Outcome
from mtp_lightning.diagnostics.parity_matrix import sample
from tests.structure.test_torch_free import loaded_by


def test_help_needs_no_torch():
    code = """
import sys
from mtp_lightning.cli.app import main
sys.argv = ["mtp", "doctor", "--help"]
try:
    main()
except SystemExit:
    pass
"""
    assert loaded_by(code) == "loaded:"


def test_help_does_not_show_what_ranks_are_told():
    text = CliRunner().invoke(app, ["doctor", "--help"]).output
    assert "--strategies" in text
    assert "--results" not in text
    assert "--cells" not in text


def test_the_machine():
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in done.output.splitlines() if line)
    assert {"python", "torch", "lightning", "deepspeed", "mtp_lightning", "devices", "CPUs"} <= lines.keys()
    assert int(lines["CPUs"]) >= 1
    assert lines["torch"][0].isdecimal()


def test_cells_without_strategies_are_refused():
    done = CliRunner().invoke(app, ["doctor", "--cells", "cells.jsonl"])
    assert done.exit_code == 2
    assert "goes with --strategies only" in done.output


def outcomes(**bad):
    first, *others = sample()
    good = {"gradients": 6e-7, "weights": 1e-7, "losses": 2e-7}
    return [Outcome(cell=first, **(good | bad)), *(Outcome(cell=cell, **good) for cell in others)]


def test_equal_strategies_are_a_row_each(capsys):
    assert print_outcomes(outcomes())
    text = capsys.readouterr().out
    assert text.count("6.0e-07") == 18
    assert f"All {len(outcomes())} cells are equal" in text


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        ({"gradients": 2e-5, "worst": "gradient 1 trunk.norm"}, "worst at gradient 1 trunk.norm"),
        ({"weights": math.inf}, "weights inf"),
        ({"gradients": math.nan}, "gradients nan"),
        ({"losses": 2e-4}, "zero1, 1 rank, sequential: "),
        ({"failure": "TrainingError: no gradient"}, "TrainingError: no gradient"),
    ],
)
def test_unequal_strategies_are_named(capsys, bad, shown):
    assert not print_outcomes(outcomes(**bad))
    text = capsys.readouterr().out
    assert f"1 of {len(outcomes())} cells are not equal" in text
    assert shown in text
