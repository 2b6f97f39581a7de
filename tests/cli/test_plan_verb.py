"""`mtp plan`, as it appears on the screen."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtp_lightning.cli.app import app
from mtp_lightning.cli.plan_tables import duration, gib, seconds, short

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/paper/13b_n4.yaml"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def mtp(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, ["plan", *arguments])


def test_plan_answers_the_questions_before_a_run() -> None:
    text = mtp(RECIPE).stdout
    assert text.startswith("paper-13b-n4  on  128 x H100 (16 nodes of 8), zero3, bf16")
    for answer in ("fits: ", "largest micro-batch", "tokens/s per GPU", "GPU-hours", "days", "MFU", "1,024"):
        assert answer in text


def test_phases_are_planned_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    text = mtp("recipes/distill/extend.yaml", "--json", str(file)).stdout
    assert all(f"distill-extend/{name}  on  " in text for name in ("one", "four", "eight", "sixteen"))
    assert list(json.loads(file.read_text())) == [
        f"distill-extend/{name}" for name in ("one", "four", "eight", "sixteen")
    ]


def test_plan_takes_overrides_and_options(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = mtp(RECIPE, "batch.micro_batch_size=2", "--gpu", "a100-80", "--gpus", "64", "--json", str(file))
    assert result.exit_code == 0
    assert "on  64 x A100-80 (8 nodes of 8)" in result.stdout
    figures = json.loads(file.read_text())
    assert figures["chosen"]["layout"]["micro_batch_size"] == 2
    assert figures["hardware"]["name"] == "A100-80"


def test_plan_says_what_does_not_fit_and_what_would() -> None:
    text = mtp(RECIPE, "--gpu", "A100-40", "--gpus", "16").stdout
    assert "does not fit: " in text
    assert "(batch.micro_batch_size)" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "7"), ("multiple of the number of GPUs", "2,048 rows for 7 GPUs", "512 or 1024 GPUs")),
        (("--gpu", "TPU"), ("A100-40, A100-80, H100, H200, B200", "'TPU'", "hardware.yaml")),
    ],
)
def test_plan_refuses_what_it_cannot_plan(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = mtp(RECIPE, *arguments)
    shown = " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert not [word for word in words if word not in shown]


def test_plan_takes_less_than_a_second() -> None:
    started_at = time.process_time()
    assert mtp(RECIPE).exit_code == 0
    assert time.process_time() - started_at < 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (gib(0), "<0.001"),
        (gib(2**40), "1,024.0"),
        (duration(1), "1.0 days"),
        (seconds(1234.5), "1,234"),
        (short(210e9), "210 B"),
        (short(1e12), "1.00 T"),
    ],
)
def test_figures_are_short(text: str, expected: str) -> None:
    assert text == expected


def test_a_dash_is_stdout_and_nothing_but_the_figures() -> None:
    done = mtp(RECIPE, "--json", "-")
    assert json.loads(done.stdout)["chosen"]["fits"]
    assert not Path("-").exists()
