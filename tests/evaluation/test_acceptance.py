"""What `mtp eval acceptance` measures is what a run's own validation measured, for a mixture source by source."""

import json

import pytest

from mtp_lightning.evaluation.acceptance import measure_acceptance
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from mtp_lightning.training.logging.metrics_files import read_rows
from tests.support.runs import ROOT, mtp

RUN = ("run.steps=12", "run.validate_every_steps=12", "logging.every_steps=12", "run.validation_samples=12")
SMALL = (
    "batch.global_batch_size=4",
    "batch.micro_batch_size=4",
    "data.seq_len=16",
    "data.validation_fraction=0.3",
    "run.threads=1",
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run on two sources, and the folders of these."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = {}
    for package, weight in (("json", 1), ("email", 3)):
        sources[str(folder / package)] = weight
        done = mtp("data", "build", f"stdlib:{package}", "--out", package, "--validation-fraction", "0.3", cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    recipe = load_recipe(
        ROOT / "recipes/debug/sequential.yaml",
        [*RUN, *SMALL, f"data.mixture={json.dumps(sources)}", f"run.dir={folder / 'run'}", "data.seq_len=16"],
    )
    assert train(recipe) == 0
    return folder / "run", sources


def test_it_measures_what_validation_measured(mixed):
    run, sources = mixed
    (row,) = read_rows(run / "metrics.csv")
    measured = measure_acceptance(run, num_rows=12)
    assert measured.figures == pytest.approx(
        {
            name.removeprefix("val/"): value
            for name, value in row.items()
            if name.startswith("val/") and "@" not in name
        },
        rel=1e-6,
    )
    assert measured.by_source.keys() == sources.keys()
    for name, figures in measured.by_source.items():
        own = {key.partition("@")[0]: value for key, value in row.items() if key.endswith(f"@{name}")}
        assert figures == pytest.approx({key.removeprefix("val/"): value for key, value in own.items()}, rel=1e-6)
        assert len(own) == 4 + 3 * 3 + 2 * 3 + 2


def test_a_source_has_the_figures_of_its_rows_alone(mixed):
    run, sources = mixed
    measured = measure_acceptance(run, num_rows=12)
    lengths = set()
    for source, weight in sources.items():
        alone = measure_acceptance(run, num_rows=3 * weight, shards=source)
        assert alone.num_rows == 3 * weight
        assert measured.by_source[source] == pytest.approx(
            {name: figure for name, figure in alone.figures.items() if not name.startswith("loss_")}, rel=1e-6
        )
        lengths.add(alone.figures["label_accuracy_1"])
    assert len(lengths) == 2


def test_the_verb(mixed, tmp_path):
    run, sources = mixed
    done = mtp("eval", "acceptance", str(run), "--rows", "12", "--json", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"acceptance length  {figures['figures']['mean_acceptance_length']:.3f} tokens per forward" in done.stdout
    assert all(f"of {source}  " in done.stdout for source in sources)
    missing = mtp("eval", "acceptance", str(run), "--shards", "nowhere", cwd=tmp_path)
    assert missing.returncode == 87
    assert "nowhere" in missing.stderr
