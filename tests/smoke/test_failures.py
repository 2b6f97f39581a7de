"""What goes wrong, seen from the shell: three parts, an exit code, no traceback, nothing lost."""

import shutil

import pytest

from tests.support.fatal import small_file_system
from tests.support.runs import ROOT, figures, mtp

RECIPE = str(ROOT / "recipes/debug/parallel.yaml")
CASES = {
    "a misspelt key": (["train", RECIPE, "optimizer.lrr=1e-3"], 2, ["optimizer.lrr", "optimizer.lr"]),
    "a wrong type": (["train", RECIPE, "run.steps=many"], 2, ["run.steps", "many"]),
    "two faults at once": (
        ["train", RECIPE, "model.hidden_size=x", "run.step=3"],
        2,
        ["model.hidden_size", "run.step"],
    ),
    "a missing recipe": (["train", "nowhere.yaml"], 2, ["nowhere.yaml"]),
    "T <= n": (["train", RECIPE, "data.seq_len=4"], 2, ["data.seq_len", "heads.num_offsets"]),
    "a corpus that is not there": (["train", RECIPE, "data.corpus=[nowhere.txt]"], 87, ["nowhere.txt"]),
    "an empty corpus": (["train", RECIPE, "data.corpus=[empty.txt]"], 87, ["at least one document"]),
    "a vocabulary smaller than a token": (["train", RECIPE, "model.vocab_size=100"], 87, ["model.vocab_size"]),
    "shards that are not there": (["train", RECIPE, "data.shards=nowhere"], 87, ["nowhere"]),
    "no GPU": (["train", RECIPE, "run.device=cuda"], 5, ["run.device=cuda"]),
    "a folder of somebody else": (["train", RECIPE, "run.dir=home"], 4, ["thesis.tex"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "empty.txt").write_text("")
    (folder / "home").mkdir()
    (folder / "home/thesis.tex").write_text("precious")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_failure_is_explained(case, place):
    arguments, code, words = CASES[case]
    if case == "no GPU" and shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    if arguments[0] == "train":
        arguments = [*arguments[:2], f"run.cache={place}/cache", *arguments[2:]]
    done = mtp(*arguments, cwd=place)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    for word in words:
        assert word in output, output
    assert (place / "home/thesis.tex").read_text() == "precious"


def test_a_full_disk_while_saving_loses_nothing(tmp_path):
    with small_file_system(tmp_path / "disk", "8m") as disk:
        settings = ("checkpoint.every_steps=4", "logging.every_steps=1", f"run.cache={tmp_path}/cache")
        small = ("train", RECIPE, *settings, f"run.dir={disk}/run")
        assert mtp(*small, "run.steps=8", cwd=tmp_path).returncode == 0
        filler = disk / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 100_000))
        full = mtp(*small, "run.steps=16", cwd=tmp_path)
        output = full.stdout + full.stderr
        assert full.returncode == 3, output
        assert "Traceback" not in output
        assert "No space left on device" in output
        filler.unlink()
        resumed = mtp(*small, "run.steps=16", cwd=tmp_path)
        assert "after step 8 of 16" in resumed.stdout, resumed.stdout + resumed.stderr
        assert resumed.returncode == 0
        assert [int(row["step"]) for row in figures(disk / "run/metrics.csv")] == list(range(1, 17))
