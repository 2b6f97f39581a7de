"""Runs side by side: figures are those of metrics.csv, intervals those of Student's t, seeds taken in pairs."""

import csv
import json
import math
import statistics

import pytest

from mtp_lightning.errors import RunFolderError
from mtp_lightning.evaluation.comparison import RunFigures, compare, draw, read_run
from mtp_lightning.evaluation.spread import spread
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT, figures, mtp

SHORT = ("run.steps=4", "run.validate_every_steps=2", "logging.every_steps=1", "run.threads=1", "heads.num_offsets=3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of two recipes: one is trained, and others have its files with other figures."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in {"plain": (), "distilled": ("objective.distill={}",)}.items():
        own = (f"name={name}", "run.seed=0", f"run.dir={folder}/{name}-0", f"run.cache={folder}/cache")
        assert train(load_recipe(ROOT / "recipes/debug/sequential.yaml", [*SHORT, *own, *changes])) == 0
        for seed in (1, 2):
            as_another_seed(folder / f"{name}-0", folder / f"{name}-{seed}", seed)
    return folder


def as_another_seed(run, folder, seed):
    folder.mkdir()
    summary = json.loads((run / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"seed": seed}))
    with (run / "metrics.csv").open() as source, (folder / "metrics.csv").open("w") as target:
        rows = csv.DictReader(source)
        writer = csv.DictWriter(target, rows.fieldnames)
        writer.writeheader()
        for row in rows:
            others = {name: float(value) * 0.97**seed for name, value in row.items() if value and name[:4] == "val/"}
            writer.writerow(row | others)


def folders(runs, *names):
    return [runs / f"{name}-{seed}" for name in names for seed in (0, 1, 2)]


def test_figures_are_those_of_the_last_validations(runs):
    plain, distilled = compare(map(read_run, folders(runs, "plain", "distilled")))
    assert (plain.recipe, plain.seeds, plain.num_offsets) == ("plain", (0, 1, 2), 3)
    last = {path.name: figures(path / "metrics.csv")[-1] for path in folders(runs, "plain", "distilled")}
    for group in (plain, distilled):
        assert group.tokens == (4 * 8 * 64,)
        for name in ("loss_1", "acceptance_rate_3", "sampled_acceptance_length"):
            values = [float(last[f"{group.recipe}-{seed}"][f"val/{name}"]) for seed in group.seeds]
            assert group.figures[name].mean == pytest.approx(statistics.mean(values))
            assert group.figures[name].margin == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3))
    pairs = [(f"distilled-{seed}", f"plain-{seed}") for seed in (0, 1, 2)]
    changes = [float(last[a]["val/loss_1"]) - float(last[b]["val/loss_1"]) for a, b in pairs]
    assert distilled.loss_change.mean == pytest.approx(statistics.mean(changes), abs=1e-9)
    assert distilled.loss_change.margin == pytest.approx(4.303 * statistics.stdev(changes) / math.sqrt(3))
    assert plain.loss_change == (0, 0)


def test_a_single_value_has_no_interval_and_many_have_a_cautious_one():
    assert spread([2.5]) == (2.5, None)
    many = [float(value) for value in range(40)]
    assert spread(many).margin == pytest.approx(2.228 * statistics.stdev(many) / math.sqrt(40))


def test_runs_that_cannot_be_told_apart_are_refused(runs):
    run = read_run(runs / "plain-0")
    with pytest.raises(RunFolderError, match="must differ in their seed"):
        compare([run, run])
    other = RunFigures("plain", 7, run.tokens, 5, run.figures)
    with pytest.raises(RunFolderError, match="seed 7 and 5 offsets"):
        compare([run, other])


def test_what_is_no_run_is_refused(tmp_path, runs):
    with pytest.raises(RunFolderError, match=r"no summary.json"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_bytes((runs / "plain-0/summary.json").read_bytes())
    with pytest.raises(RunFolderError, match="no validation"):
        read_run(tmp_path)


def test_the_picture_is_drawn(tmp_path, runs):
    draw(compare(map(read_run, folders(runs, "plain", "distilled"))), tmp_path / "pictures/out.png")
    assert (tmp_path / "pictures/out.png").read_bytes().startswith(b"\x89PNG")


def test_the_verb(tmp_path, runs):
    paths = [*map(str, folders(runs, "plain")), str(runs / "distilled-1")]
    done = mtp("report", "compare", *paths, "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout
    assert "A single seed has no interval" in done.stdout
    assert "Not at equal tokens" not in done.stdout
    plain, distilled = json.loads((tmp_path / "out.json").read_text())
    assert plain["seeds"] == [0, 1, 2]
    assert distilled["main_head_loss_change"]["margin"] is None
    refused = mtp("report", "compare", ".", cwd=tmp_path)
    assert refused.returncode == RunFolderError.exit_code
