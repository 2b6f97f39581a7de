"""Run folders as a run leaves them, written without training."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.loading.dump import recipe_to_yaml
from mtp_lightning.training.logging.columns import metric_columns
from tests.support.runs import ROOT

Figure = Callable[[str, int], float | None]


def usual(name: str, step: int) -> float | None:
    """Return a figure of a column at a step: falling losses, rising shares; validation at every tenth step."""
    if name.startswith(("val/", "drift/")) and step % 10:
        return None
    k = int(name.rpartition("_")[2].partition("@")[0]) if name.partition("@")[0][-1].isdigit() else 1
    if "loss" in name:
        return 1.5 + 0.3 * k + 3 * math.exp(-step / 50)
    if "length" in name:
        return 1 + 2 * (1 - math.exp(-step / 80))
    return (1 - math.exp(-step / 80)) ** k


def write_run(
    folder: Path,
    *,
    name: str = "made-up",
    num_offsets: int = 4,
    steps: int = 100,
    sources: tuple[str, ...] = (),
    figure: Figure = usual,
    attempts: int = 1,
    overrides: tuple[str, ...] = (),
) -> Path:
    """Write a run folder with one row of metrics per step."""
    words = [
        f"name={json.dumps(name, ensure_ascii=False)}",
        f"heads.num_offsets={num_offsets}",
        f"run.steps={steps}",
        "heads.layers_from_trunk=false",
        *overrides,
    ]
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_to_yaml(load_recipe(ROOT / "recipes/debug/parallel.yaml", words).recipe))
    columns = metric_columns(num_offsets, sources)
    with (folder / "metrics.csv").open("w") as file:
        file.write(",".join(f'"{column}"' if "," in column else column for column in columns) + "\n")
        for step in range(1, steps + 1):
            figures = (
                step if name == "step" else 512 * step if name == "tokens" else figure(name, step) for name in columns
            )
            file.write(",".join("" if value is None else f"{value:.6g}" for value in figures) + "\n")
    for number in range(1, attempts + 1):
        logs = folder / f"logs/attempt_{number}"
        logs.mkdir(parents=True)
        told = {"started_at": f"2026-01-0{number}T00:00:00+00:00", "host": "node1", "packages": {"torch": "2.13.0"}}
        (logs / "environment.json").write_text(json.dumps(told))
    return folder
