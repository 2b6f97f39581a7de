"""Law 9 under ZeRO: killed and started again = never killed, to the bit; and close to it with other ranks or stages."""

import random
import shutil
import time
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.averages import assert_average_of_steps
from tests.support.runs import ROOT, figures, last_step, mtp, mtp_killed

pytestmark = pytest.mark.xdist_group("resumed under ZeRO")  # they share their uninterrupted runs
STEPS = 24
RUN = (f"run.steps={STEPS}", "checkpoint.every_steps=3", "run.validate_every_steps=8", "logging.every_steps=1")
ELASTIC_TOLERANCE = 1e-4
BF16_TOLERANCE = 0.02
QUICKSTART = (
    "run.steps=36",
    "logging.every_steps=3",
    "data.seq_len=64",
    "batch.global_batch_size=16",
    "batch.micro_batch_size=4",
)
"""Long enough for the loss to fall by a third, short enough for a minute per run."""


def train(folder, kind, ranks, *extra):
    return (
        "train",
        str(ROOT / "recipes/debug/sequential.yaml"),
        *RUN,
        "batch.micro_batch_size=2",
        f"run.dir={folder}",
        f"run.cache={folder.parent}/cache",
        f"strategy.kind={kind}",
        f"strategy.ranks_per_node={ranks}",
        *extra,
    )


def to_the_end(folder, kind, ranks, *extra):
    done = mtp(*train(folder, kind, ranks, *extra), cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_step(folder / "metrics.csv") == STEPS
    return done


def killed(folder, kind, ranks, *extra, seed=0, after_step=None):
    """SIGKILL the process that started the ranks, at a random moment after a random step."""
    metrics = folder / "metrics.csv"
    after_step = after_step or min(STEPS // 2 + 2, max(6, last_step(metrics) + random.Random(seed).randint(1, 5)))
    command = train(folder, kind, ranks, *extra)
    assert mtp_killed(*command, cwd=folder.parent, metrics=metrics, after_step=after_step, seed=seed) == -9
    assert_nobody_stays(folder)
    assert 6 <= last_step(metrics) < STEPS


def assert_nobody_stays(folder):
    """Ranks die with what started them."""
    until = time.monotonic() + 5
    while processes_of(folder) and time.monotonic() < until:
        time.sleep(0.02)
    assert processes_of(folder) == []


def processes_of(folder):
    argument = f"run.dir={folder}".encode()
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if argument in read_or_nothing(path)]


def read_or_nothing(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def final_files(folder):
    """Digests of the last checkpoint's shards: short, so that a failed comparison is too."""
    shards = sorted((folder / f"checkpoints/step-{STEPS:08d}").glob("*.safetensors"))
    assert len(shards) >= 2
    return {shard.name: sha256(shard.read_bytes()).hexdigest() for shard in shards}


def assert_same_run(folder, whole):
    assert figures(folder / "metrics.csv") == figures(whole / "metrics.csv")
    assert final_files(folder) == final_files(whole)


def curves(folder):
    """Losses of every offset at every logged step or validation, by step and column."""
    rows = figures(folder / "metrics.csv")
    return {
        (row["step"], column): float(value)
        for row in rows
        for column, value in row.items()
        if "/loss_" in column and value
    }


def assert_near(folder, whole, tolerance):
    found, expected = curves(folder), curves(whole)
    assert found.keys() == expected.keys()
    assert len(expected) > 40
    worst = max(abs(found[key] / expected[key] - 1) for key in expected)
    assert worst <= tolerance, worst
    return worst


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of a stage on a number of ranks, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    def run(kind, ranks):
        path = folder / f"{kind}-{ranks}"
        if not path.exists():
            to_the_end(path, kind, ranks)
        return path

    return run


@pytest.mark.matrix  # by way of four ranks below
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_closely_on_one_rank(whole, tmp_path):
    folder = tmp_path / "elastic"
    killed(folder, "zero2", 2)
    assert "Continuing" in to_the_end(folder, "zero2", 1).stdout
    assert assert_near(folder, whole("zero2", 2), ELASTIC_TOLERANCE) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_killed_runs_go_on_exactly(whole, tmp_path, kind):
    folder = tmp_path / "killed"
    for seed in range(2):
        killed(folder, kind, 2, seed=seed)
    assert "Continuing" in to_the_end(folder, kind, 2).stdout
    assert_same_run(folder, whole(kind, 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_while_the_clock_of_the_first_rank_says_what_is_saved(whole, tmp_path):
    """0.3 s: every few steps, at other ones in each process and attempt."""
    folder = tmp_path / "killed"
    by_clock = ("checkpoint.every_steps=null", "checkpoint.every_minutes=0.005", "checkpoint.keep_every_steps=5")
    for seed in range(2):
        killed(folder, "zero2", 2, *by_clock, seed=20 + seed)
    assert "Continuing" in to_the_end(folder, "zero2", 2, *by_clock).stdout
    assert_same_run(folder, whole("zero2", 2))
    kept = {int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")}
    assert kept >= {5, 10, 15, 20, STEPS}
    assert len(kept) <= 7, "the newest two and the best besides"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_killed_while_checkpoints_are_written_in_the_background(whole, tmp_path, kind):
    folder, often = tmp_path / "killed", ("checkpoint.in_background=true", "checkpoint.every_steps=2")
    for seed in range(2):
        killed(folder, kind, 2, *often, seed=10 + seed)
    to_the_end(folder, kind, 2, *often)
    assert_same_run(folder, whole(kind, 2))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "legs",
    [
        (("zero2", 2), ("zero2", 4), ("zero2", 1)),
        (("zero3", 2), ("zero3", 4), ("zero3", 1)),
        (("zero2", 2), ("zero3", 2), ("single", 1)),
        (("single", 1), ("zero1", 2), ("zero3", 1)),
    ],
    ids=lambda legs: "-".join(f"{kind}x{ranks}" for kind, ranks in legs),
)
def test_other_ranks_and_stages_go_on_closely(whole, tmp_path, legs):
    folder = tmp_path / "elastic"
    first, second, last = legs
    killed(folder, *first, after_step=6)
    killed(folder, *second, after_step=14)
    assert "Continuing" in to_the_end(folder, *last).stdout
    assert_near(folder, whole("single", 1), ELASTIC_TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stages_and_one_process_train_alike(whole):
    for kind, ranks in (("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero2", 4)):
        assert_near(whole(kind, ranks), whole("single", 1), ELASTIC_TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_windows_that_are_cut_go_on_exactly_and_as_whole_ones(whole, tmp_path):
    cut, end, folder = "strategy.sequence_parallel=2", tmp_path / "end", tmp_path / "killed"
    to_the_end(end, "zero2", 2, cut)
    assert_near(end, whole("single", 1), ELASTIC_TOLERANCE)
    killed(folder, "zero2", 2, cut, after_step=6)
    shutil.copytree(folder, tmp_path / "other")
    assert "Continuing" in to_the_end(folder, "zero2", 2, cut).stdout
    assert_same_run(folder, end)
    assert "Continuing" in to_the_end(tmp_path / "other", "zero3", 2).stdout
    assert_near(tmp_path / "other", end, ELASTIC_TOLERANCE)


MUON = ("optimizer.kind=muon", "optimizer.schedule=wsd", "optimizer.ema={decay: 0.9, every_steps: 2}")
"""Muon rounds to bf16: where a gradient's last bit differs, a part in 250 of a step does."""


@pytest.fixture(scope="module")
def single_muon(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon") / "single"
    to_the_end(folder, "single", 1, *MUON)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_muon_and_averages_go_on_exactly_and_as_on_one_process(single_muon, tmp_path, kind):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    to_the_end(whole, kind, 2, *MUON)
    killed(folder, kind, 2, *MUON)
    assert "Continuing" in to_the_end(folder, kind, 2, *MUON).stdout
    assert_same_run(folder, whole)
    assert_near(whole, single_muon, 10 * ELASTIC_TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_the_average_of_shards_is_that_of_torch(tmp_path, kind):
    folder = tmp_path / "run"
    every = ("checkpoint.every_steps=1", "checkpoint.keep=20", "run.steps=6", "optimizer.warmup_steps=0")
    done = mtp(*train(folder, kind, 2, *MUON, *every), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_average_of_steps(folder, (1, 3, 5), decay=0.9)


@pytest.mark.slow
def test_another_seed_is_neither_the_same_nor_near(whole, tmp_path):
    """The comparisons above can fail."""
    to_the_end(tmp_path / "other", "zero2", 2, "run.seed=1")
    assert final_files(tmp_path / "other") != final_files(whole("zero2", 2))
    with pytest.raises(AssertionError):
        assert_near(tmp_path / "other", whole("zero2", 2), 10 * ELASTIC_TOLERANCE)


@pytest.fixture(scope="module")
def single_quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    quickstart(folder / "single")
    return folder / "single"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_bf16_trains_like_fp32_on_one_process(single_quickstart, kind):
    folder = single_quickstart.parent / kind
    quickstart(folder, "run.precision=bf16", f"strategy.kind={kind}", "strategy.ranks_per_node=2")
    assert assert_near(folder, single_quickstart, BF16_TOLERANCE) > 1e-5  # it did compute in bf16


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_bf16_ranks_change_no_gradient_unless_they_round_what_they_add_up(tmp_path):
    def norms(kind, ranks, dtype):
        folder = tmp_path / f"{kind}-{ranks}-{dtype}"
        fields = ("run.precision=bf16", f"strategy.reduce_dtype={dtype}", "run.steps=1", "logging.every_steps=1")
        done = mtp(*train(folder, kind, ranks), *fields, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        row = figures(folder / "metrics.csv")[0]
        return [float(row[f"grad_norm/{part}"]) for part in ("trunk", "heads", "unembedding")]

    alone = norms("zero1", 1, "fp32")
    for kind in ("zero1", "zero2", "zero3"):
        assert norms(kind, 2, "fp32") == pytest.approx(alone, rel=1e-6)
    assert norms("zero2", 2, "bf16") != pytest.approx(alone, rel=1e-5)


def quickstart(folder, *extra):
    recipe = str(ROOT / "recipes/quickstart.yaml")
    places = (f"run.dir={folder}", f"run.cache={folder.parent}/cache")
    done = mtp("train", recipe, *QUICKSTART, *places, *extra, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
