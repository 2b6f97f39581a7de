"""A folder becomes a run only if it is new, empty, or made by a run; nobody else's files are touched."""

import hashlib
import re
import shutil

import pytest

from mtp_lightning.checkpoint.convert.consolidate import consolidate
from mtp_lightning.errors import CheckpointError, RunFolderError
from mtp_lightning.launch.run_marker import MARKER
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.checkpoint.foreign import write_folder
from tests.support.runs import ROOT, figures, mtp

RECIPE = ROOT / "recipes/debug/parallel.yaml"
SHORT = ("run.steps=2", "run.validate_every_steps=2", "checkpoint.every_steps=1", "run.threads=1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """A finished run, never written to."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    own = ("logging.curves=true", f"run.dir={folder}", f"run.cache={cache}")
    assert train(load_recipe(RECIPE, [*SHORT, *own])) == 0
    return folder


@pytest.fixture
def start(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(*overrides, recipe=RECIPE):
        return train(load_recipe(recipe, [*SHORT, f"run.cache={cache}", *overrides]))

    return start


def content_of(folder):
    """Every name beneath a folder, with a digest of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_export(folder, run):
    consolidate(run, folder)


def make_checkpoint(folder, run):
    shutil.copytree(run / "checkpoints/step-00000002", folder)


def make_attempt(folder, run):
    shutil.copytree(run / "logs/attempt_1", folder)


def make_project(folder, run):
    shutil.copy(run / "recipe.yaml", folder.parent / "recipe.yaml")
    write(folder / "recipe.yaml", (run / "recipe.yaml").read_text())
    write(folder / "thesis.tex", "years of work")


def make_shards(folder, run):
    write(folder / "manifest.json", "{}")
    write(folder / "train-00000.tar", "tokens")


def make_model(folder, run):
    write(folder / "config.json", "{}")
    write(folder / "model.safetensors", "weights")


def make_logs(folder, run):
    write(folder / "logs/web.log", "GET /")


def make_file(folder, run):
    write(folder, "text")


def make_link(folder, run):
    folder.symlink_to("nowhere")


FOREIGN = {
    "export": (make_export, "a model that was exported, imported or extended"),
    "checkpoints/step-00000002": (make_checkpoint, "a checkpoint"),
    "logs/attempt_1": (make_attempt, "the log of one start"),
    "project": (make_project, "a folder that holds recipe.yaml, thesis.tex"),
    "shards": (make_shards, "a folder of shards"),
    "model": (make_model, "a model in Hugging Face's layout"),
    "others": (make_logs, "a folder that holds logs"),
    "file": (make_file, "a file"),
    "link": (make_link, "a link to nowhere, which is not there"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("fresh", ["false", "true"], ids=["", "fresh"])
def test_what_no_run_has_made_is_named_and_stays_as_it_is(start, trained, tmp_path, name, fresh):
    make, what = FOREIGN[name]
    folder = tmp_path / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    make(folder, trained)
    before = content_of(tmp_path)
    with pytest.raises(RunFolderError) as caught:
        start(f"run.dir={folder}", f"run.restart={fresh}")
    assert what in caught.value.found
    assert content_of(tmp_path) == before


def test_the_command_says_the_same_of_a_folder_and_of_a_recipe_of_ones_own(trained, tmp_path):
    make_export(tmp_path / "export", trained)
    make_project(tmp_path / "project", trained)
    before = content_of(tmp_path)
    for arguments, where in [(["export"], "."), (["recipe.yaml", "run.dir=."], "project")]:
        done = mtp("train", *arguments, "run.steps=3", cwd=tmp_path / where)
        assert done.returncode == RunFolderError.exit_code
        assert "Nothing has been changed" in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr
    assert content_of(tmp_path) == before


def test_new_empty_and_own_folders_become_runs(start, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("new/deep", "empty"):
        assert start(f"run.dir={folder}") == 0
        assert (tmp_path / folder / MARKER).is_file()
    assert start("run.dir=empty", "run.steps=3") == 0
    assert start("run.dir=empty", "run.restart=true") == 0
    assert (tmp_path / "empty.1" / MARKER).is_file()


def damage(checkpoints):
    for path in checkpoints.glob("step-*/model-*"):
        path.write_bytes(b"x" * path.stat().st_size)


def cut(checkpoints):
    for path in checkpoints.glob("step-*/model-*"):
        path.unlink()


@pytest.mark.parametrize("harm", [damage, cut, shutil.rmtree], ids=["damaged", "cut", "removed"])
def test_a_run_that_has_lost_its_checkpoints_does_not_begin_again(start, trained, tmp_path, harm):
    shutil.copytree(trained, tmp_path / "run")
    harm(tmp_path / "run/checkpoints")
    rows = figures(tmp_path / "run/metrics.csv")
    for overrides in ((), ("model.hidden_size=64", "run.seed=7")):
        with pytest.raises(CheckpointError, match=r"must go on from one of them; found none that is whole .* step 1"):
            start("run.dir=run", *overrides)
    assert figures(tmp_path / "run/metrics.csv") == rows
    assert start("run.dir=run", "run.restart=true") == 0
    assert (tmp_path / "run.1/metrics.csv").is_file()


@pytest.mark.parametrize("name", ["summary.json", "curves.png", ".lock", "metrics.csv", "logs", "tensorboard"])
def test_what_stands_in_the_way_of_a_run_is_named_before_it_begins(start, trained, tmp_path, name):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / name
    if is_file := path.is_file():
        path.unlink()
        path.mkdir()
    else:
        shutil.rmtree(path)
        path.write_text("")
    with pytest.raises(RunFolderError, match=f"{name} of a run must be a {'file' if is_file else 'folder'}"):
        start("run.dir=run", "run.steps=3")


def test_other_names_among_the_logs_are_passed_over(start, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for name in ("attempt_1.bak", "attempt_x", "attempt_", "submit_old"):
        (tmp_path / "run/logs" / name).mkdir()
    assert start("run.dir=run", "run.steps=3") == 0
    assert (tmp_path / "run/logs/attempt_2").is_dir()


PHASES = "extends: {root}/recipes/debug/parallel.yaml\nphases:\n  {name}: {{run: {{steps: 2}}}}\n"


def test_other_phases_and_none_are_not_laid_over_those_that_began(start, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.yaml", PHASES.format(root=ROOT, name=name))
    assert start("run.dir=run", recipe=tmp_path / "a.yaml") == 0
    before = content_of(tmp_path / "run/phases") | {"recipe.yaml": (tmp_path / "run/recipe.yaml").read_text()}
    for recipe in (tmp_path / "b.yaml", RECIPE):
        with pytest.raises(RunFolderError, match=r"phases that run began with; found 1-a there"):
            start("run.dir=run", recipe=recipe)
    assert start("run.dir=plain") == 0
    with pytest.raises(RunFolderError, match="a run without phases there, and 1-a in the recipe"):
        start("run.dir=plain", recipe=tmp_path / "a.yaml")
    after = content_of(tmp_path / "run/phases") | {"recipe.yaml": (tmp_path / "run/recipe.yaml").read_text()}
    assert after == before


def test_preflight_and_submit_touch_no_foreign_folder_either(trained, tmp_path, cache):
    make_project(tmp_path / "project", trained)
    before = content_of(tmp_path)
    done = mtp("preflight", str(RECIPE), "run.dir=project", f"run.cache={cache}", cwd=tmp_path)
    assert done.returncode == 6
    assert "FAIL run folder" in done.stdout
    assert "a folder that holds recipe.yaml, thesis.tex" in done.stdout
    done = mtp("submit", str(RECIPE), "--site", "local", "--dry-run", "run.dir=project", cwd=tmp_path)
    assert done.returncode == RunFolderError.exit_code
    assert "a folder that holds recipe.yaml, thesis.tex" in done.stderr.replace("\n", " ")
    assert content_of(tmp_path) == before


OUT = {
    "export": ("export", "RUN", "--out", "OUT"),
    "export in HF's layout": ("export", "RUN", "--format", "trunk", "--out", "OUT"),
    "import": ("import", "HF", "--offsets", "2", "--out", "OUT"),
    "extend": ("extend", "RUN", "--to", "6", "--out", "OUT"),
    "data build": ("data", "build", "--out", "OUT", "notes.txt"),
    "data generate": ("data", "generate", "RUN", "--prompts", "prompts.txt", "--out", "OUT"),
    "sweep": ("sweep", str(RECIPE), "--out", "OUT"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OUT)
def test_no_out_mixes_with_files_of_others(trained, tmp_path, name):
    write(tmp_path / "out/thesis.tex", "years of work")
    write(tmp_path / "notes.txt", "a text to build of")
    write(tmp_path / "prompts.txt", "def main(\n")
    write_folder(tmp_path / "hf")
    places = {"RUN": str(trained), "HF": "hf", "OUT": "out"}
    done = mtp(*(places.get(word, word) for word in OUT[name]), cwd=tmp_path)
    assert done.returncode not in (0, 1), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"must be (a )?new|a folder of their own", " ".join(done.stderr.split())), done.stderr
    assert content_of(tmp_path / "out") == {"thesis.tex": hashlib.sha256(b"years of work").hexdigest()}
