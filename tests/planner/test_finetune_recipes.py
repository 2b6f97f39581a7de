"""The fine-tuning recipes are those of Gloeckle et al. 2024, table S13, and start from what the paper recipes train."""

from pathlib import Path

import pytest

from mtp_lightning.cli.plan_view import cost_line
from mtp_lightning.planner.report import build_plan
from mtp_lightning.recipe import load_recipe, num_trunk_layers
from tests.support.runs import ROOT

PATHS = sorted((ROOT / "recipes/finetune").glob("*.yaml"))
OPTIMIZERS = {  # batch in 2^20 tokens, steps, warm-up, peak rate, share of it at the end, gradient's norm
    "summarise": (0.125, 7140, 100, 3e-5, 0.03, 1.0),
    "codecontests": (0.25, 13_000, 400, 5e-5, 0.004, 0.1),
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_settings_are_the_papers_and_the_start_fits(path: Path) -> None:
    recipe, (task, way) = load_recipe(path).recipe, path.stem.split("_")
    tuned = recipe.optimizer
    batch = recipe.batch.global_batch_size * recipe.data.seq_len / 2**20
    steps = (batch, recipe.run.steps, tuned.warmup_steps, tuned.lr, tuned.min_lr_ratio, tuned.max_grad_norm)
    assert steps == OPTIMIZERS[task]
    assert recipe.data.seq_len == 4096
    start = load_recipe(ROOT / f"recipes/paper/6.7b_n{way[0]}.yaml").recipe
    assert recipe.init.path == start.run.dir
    assert (start.heads.num_offsets, recipe.heads.num_offsets) == (int(way[0]), int(way[-1]))
    assert num_trunk_layers(recipe) == num_trunk_layers(start)
    assert f"# Cost:     {cost_line(build_plan(recipe))}" in path.read_text(encoding="utf-8").splitlines()


def test_there_are_three_ways_for_each_task() -> None:
    assert [path.stem for path in PATHS] == [
        f"{task}_{way}" for task in sorted(OPTIMIZERS) for way in ("1to1", "4to1", "4to4")
    ]
