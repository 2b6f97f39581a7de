"""A plan as plain values and on the screen."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mtp_lightning.cli import plan_view as plan_screen
from mtp_lightning.errors import MtpError
from mtp_lightning.planner.report import SCALES, build_plan
from mtp_lightning.recipe.loading.load import load_recipe
from mtp_lightning.recipe.schema.root import Recipe
from tests.recipe.golden import assert_golden
from tests.structure.source import ROOT


def recipe_at(path: str, *overrides: str) -> Recipe:
    """Load a recipe of the repository."""
    return load_recipe(ROOT / "recipes" / path, overrides).recipe


def screen_of(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, width: int = 100, **options: object) -> str:
    """Print a plan on a screen of some width, and return what it shows."""
    shown = Console(file=StringIO(), width=width, highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(plan_screen, "console", lambda: shown)
    plan_screen.print_plan(build_plan(recipe, **options))
    assert isinstance(shown.file, StringIO)
    return "".join(f"{line.rstrip()}\n" for line in shown.file.getvalue().splitlines())


PLANS = {
    "quickstart": (("quickstart.yaml",), {}),
    "paper-13b-n4": (("paper/13b_n4.yaml",), {}),
    "paper-13b-n4-on-8-a100-40": (("paper/13b_n4.yaml",), {"gpu": "A100-40", "num_gpus": 8}),
    "paper-6.7b-bytes-n8-on-b200": (("paper/6.7b_bytes_n8.yaml",), {"gpu": "B200"}),
    "paper-1.3b-joint-offloaded": (
        ("paper/1.3b_n4.yaml", "objective.backward_order=joint", "strategy.offload_optimizer=cpu"),
        {"num_gpus": 1},
    ),
    "paper-6.7b-n4-heads-only": (("paper/6.7b_n4.yaml", "freeze=[trunk,unembedding]"), {"num_gpus": 8}),
    "paper-6.7b-n4-updates": (("paper/6.7b_n4.yaml", "adapt.lora={}", "freeze=[unembedding]"), {"num_gpus": 8}),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan_has_its_recorded_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, options = PLANS[name]
    text = screen_of(recipe_at(*recipe), monkeypatch, **options)
    assert max(map(len, text.splitlines())) <= 100
    assert_golden(f"plans/{name}.txt", text)


def test_narrow_screens_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen_of(recipe_at("quickstart.yaml"), monkeypatch, width=80)
    assert "memory per GPU" in text
    assert "time per step" in text
    assert "…" not in text


def test_plan_survives_json() -> None:
    plan = build_plan(recipe_at("paper/13b_n4.yaml"))
    figures = json.loads(json.dumps(plan.as_json(), allow_nan=False))
    chosen = figures["chosen"]
    assert figures["parameters"]["total"] == 13_015_864_320
    assert chosen["memory"]["total"] == plan.chosen.memory.total
    assert chosen["time"]["total_s"] == pytest.approx(sum(v for k, v in chosen["time"].items() if k != "total_s"))
    assert [scale["num_gpus"] for scale in figures["scales"]] == list(SCALES)


def test_plan_says_what_is_trained() -> None:
    whole, frozen = (
        build_plan(recipe_at("paper/13b_n4.yaml", *overrides)).as_json()
        for overrides in ((), ("freeze=[trunk,unembedding]",))
    )
    assert whole["trainable_parameters"] == whole["parameters"]["total"]
    assert frozen["trainable_parameters"] == frozen["parameters"]["heads"]
    assert frozen["total_flops"] < whole["total_flops"] / 2


def test_days_follow_from_tokens_per_second() -> None:
    plan = build_plan(recipe_at("paper/13b_n4.yaml"))
    seconds = plan.total_tokens / (plan.chosen.tokens_per_s * 128)
    assert plan.chosen.days == pytest.approx(seconds / 86_400)
    assert plan.chosen.days == pytest.approx(plan.recipe.run.steps * plan.chosen.time.total_s / 86_400)
    assert plan.chosen.gpu_hours == pytest.approx(plan.chosen.days * 24 * 128)


def test_recipes_own_strategy_is_among_those_compared() -> None:
    plan = build_plan(recipe_at("paper/1.3b_n4.yaml", "strategy.offload_optimizer=cpu"))
    assert plan.chosen.layout in [variant.layout for variant in plan.strategies]


def test_rows_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(MtpError, match="must be a multiple of the number of GPUs; found 2,048 rows for 6 GPUs"):
        build_plan(recipe_at("paper/13b_n4.yaml"), num_gpus=6)


def test_unknown_gpu_is_refused_with_those_known() -> None:
    with pytest.raises(MtpError, match="A100-40, A100-80, H100, H200, B200; found the unknown name 'V100'"):
        build_plan(Recipe(), "V100")


def test_figures_are_written_where_asked(tmp_path: Path) -> None:
    plan_screen.write_plans([build_plan(Recipe())], tmp_path / "new/plan.json")
    assert json.loads((tmp_path / "new/plan.json").read_text())["tokens_per_step"] == 4096


def test_checkpoints_that_are_kept_for_ever_take_room() -> None:
    recipe = Recipe.model_validate({"run": {"steps": 1000}, "checkpoint": {"keep": 3, "keep_every_steps": 100}})
    disk, few = build_plan(recipe).disk, build_plan(Recipe()).disk
    assert (few.num_checkpoints, disk.num_checkpoints) == (4, 3 + 2 + 10)
    assert disk.total == 15 * few.bytes_each
