"""The recipes of the paper: its tables, headers that tell the truth, and a plan that fits."""

from pathlib import Path

import pytest

from mtp_lightning.cli.plan_view import cost_line
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.planner.flops import tokens_per_step
from mtp_lightning.planner.report import build_plan
from mtp_lightning.recipe.loading.load import load_recipe
from mtp_lightning.recipe.schema.root import Recipe
from tests.structure.source import ROOT

FOLDER = ROOT / "recipes/paper"
PATHS = sorted(FOLDER.glob("*.yaml"))
WIDTHS = {  # [Gloeckle 2024, table S14]: D, L, attention heads; parameters by name
    "0.3b": (1024, 18, 16, 0.3e9),
    "0.6b": (1280, 27, 20, 0.6e9),
    "1.3b": (2048, 24, 16, 1.3e9),
    "3b": (2560, 36, 20, 3e9),
    "6.7b": (4096, 32, 32, 6.7e9),
    "13b": (5120, 40, 40, 13e9),
}
STEPS_AND_WARMUP = {"6.7b": (25_000, 2000), "13b": (25_000, 1000)}  # table S13; the others 10,850 and 1000

every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def recipe_at(path: Path) -> Recipe:
    """Load a recipe."""
    return load_recipe(path).recipe


def test_every_size_has_every_number_of_offsets() -> None:
    names = {f"{size}_n{num_offsets}" for size in WIDTHS for num_offsets in (1, 2, 4)}
    assert {path.stem for path in PATHS} == names | {"base", "6.7b_bytes_n8"}


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("num_offsets", [1, 2, 4])
def test_scaling_runs_follow_the_papers_tables(size: str, num_offsets: int) -> None:
    recipe = recipe_at(FOLDER / f"{size}_n{num_offsets}.yaml")
    width, num_layers, num_heads, num_parameters = WIDTHS[size]
    steps, warmup = STEPS_AND_WARMUP.get(size, (10_850, 1000))
    model, optimizer, heads = recipe.model, recipe.optimizer, recipe.heads
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (width, num_layers, num_heads)
    assert (heads.num_offsets, heads.kind, heads.layers_from_trunk) == (num_offsets, "parallel", True)
    assert (recipe.run.steps, optimizer.warmup_steps) == (steps, warmup)
    assert (optimizer.lr, optimizer.min_lr_ratio, optimizer.weight_decay, optimizer.max_grad_norm) == (
        3e-4,
        0.03,
        0.1,
        1.0,
    )
    assert (optimizer.betas, model.vocab_size, recipe.data.seq_len) == ([0.9, 0.95], 32_000, 4096)
    assert tokens_per_step(recipe) == 8 * 2**20
    assert parameter_counts(recipe).total == pytest.approx(num_parameters, rel=0.06)


def test_byte_level_run_follows_the_papers_tables() -> None:
    recipe = recipe_at(FOLDER / "6.7b_bytes_n8.yaml")
    assert (recipe.heads.num_offsets, recipe.heads.unembedding) == (8, "replicated")
    assert (recipe.data.seq_len, tokens_per_step(recipe), recipe.run.steps) == (8192, 12 * 2**20, 25_000)
    assert (recipe.model.hidden_size, recipe.model.num_hidden_layers, recipe.model.vocab_size) == (4096, 32, 257)


def test_largest_recipe_is_for_sixteen_nodes() -> None:
    recipe = recipe_at(FOLDER / "13b_n4.yaml")
    assert (recipe.strategy.num_nodes, recipe.strategy.ranks_per_node, recipe.strategy.kind) == (16, 8, "zero3")
    assert recipe.memory.recompute_trunk
    assert recipe.run.precision == "bf16"


@every_path
def test_recipe_fits_with_room_to_spare(path: Path) -> None:
    plan = build_plan(recipe_at(path))
    assert plan.chosen.memory.total < 0.8 * plan.hardware.memory_bytes


@every_path
def test_header_gives_the_planners_cost_and_the_command(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    recipe = recipe_at(path)
    assert f"# Cost:     {cost_line(build_plan(recipe))}" in header
    launch = next(line for line in header if line.startswith("# Launch:"))
    assert launch.endswith(f"mtp train {path.relative_to(ROOT)}")
    assert (f"--nodes={recipe.strategy.num_nodes} " in launch) == (recipe.strategy.num_nodes > 1)


@every_path
def test_figures_are_called_the_papers(path: Path) -> None:
    words = path.read_text(encoding="utf-8").replace("#", " ").split()
    assert "paper's figures, not measured here" in " ".join(words) or path.stem == "base"
