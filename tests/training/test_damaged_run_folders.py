"""Any one entry of a run folder damaged: the run goes on or says why not, at once, and loses nothing."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from mtp_lightning.cli.recipe_argument import open_recipe
from mtp_lightning.errors import MtpError
from mtp_lightning.launch.status import statuses
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT

SMALL = ("run.validation_samples=2", "data.seq_len=16", "run.threads=1", "batch.micro_batch_size=2")
SMALL += ("batch.global_batch_size=2", "checkpoint.every_steps=1", "data.corpus=[text]", "run.cache=cache")
SMALL += ("model.hidden_size=16", "model.num_attention_heads=2", "model.num_key_value_heads=1")
RECIPE = ROOT / "recipes/debug/parallel.yaml"
LONGEST_S = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of two steps in it, which tests copy."""
    place = tmp_path_factory.mktemp("runs")
    (place / "text").mkdir()
    for number in range(30):
        (place / f"text/{number}.txt").write_text(f"some text of {number} " * 20)
    with pytest.MonkeyPatch.context() as there:
        there.chdir(place)
        assert train(load_recipe(RECIPE, [*SMALL, "run.steps=2", "run.dir=run"])) == 0
    return place


def entries(run):
    """Everything in a run folder, but what other programs write for themselves."""
    return sorted(path for path in run.rglob("*") if "tfevents" not in path.name)


def remove(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def put(content):
    def damage(path, rng):
        remove(path)
        path.write_bytes(content)

    return damage


def cut(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def flip(path, rng):
    content = bytearray(path.read_bytes() or b"x")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def number(path, rng):
    """Give a number in a text another size."""
    words = path.read_bytes().split(b":")
    spots = [index for index, word in enumerate(words) if word.strip()[:1].isdigit()]
    if spots:
        words[rng.choice(spots)] = (
            rng.choice((b" -1", b" 1e999", b" " + b"9" * 5000, b" null", b' "x"', b" []")) + b"\n"
        )
    path.write_bytes(b":".join(words))


def folder(path, rng):
    remove(path)
    path.mkdir()
    (path / "somebody's").write_text("own")


def pipe(path, rng):
    remove(path)
    os.mkfifo(path)


def link(path, rng):
    remove(path)
    path.symlink_to(path.name if rng.random() < 0.5 else "nowhere")


def beside(path, rng):
    """Put something of an odd name beside it."""
    name = rng.choice((".bak", "~", "\nx", "\x1b[2J", " copy", "\udcff"))
    path.with_name(path.name + name).write_bytes(b"\xff\xfe")


DAMAGES = {"remove": lambda path, rng: remove(path), "folder": folder, "pipe": pipe, "link": link, "beside": beside}
DAMAGES |= {"cut": cut, "flip": flip, "number": number, "empty": put(b""), "noise": put(bytes(range(256)))}
DAMAGES |= {
    "null": put(b"null"),
    "list": put(b"[]"),
    "mapping": put(b"{}"),
    "text": put(b"x"),
    "deep": put(b"[" * 99999),
}
DAMAGES |= {"utf16": put("name: é\n".encode("utf-16")), "digits": put(b"9" * 5000), "run": put(b'{"run": null}')}
OF_FILES = ("cut", "flip", "number")


def content_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.is_symlink()}


def damaged(place, monkeypatch, seed):
    """Copy the run, and damage one entry of it; say what was done."""
    rng = random.Random(seed)
    monkeypatch.chdir(place)
    run = Path(f"run-{seed}")
    shutil.copytree("run", run)
    name = list(DAMAGES)[seed % len(DAMAGES)]
    path = rng.choice([path for path in entries(run) if path.is_file() or name not in OF_FILES])
    DAMAGES[name](path, rng)
    return run, f"{name} {path.relative_to(run)}", path


def out_of_time(*_):
    raise AssertionError(f"must end within {LONGEST_S} s")


def go_on(run):
    """Train on; return what was said instead, as the command line does."""
    try:
        assert train(open_recipe(str(run), ["run.steps=3"])) == 0
    except (MtpError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        return str(error)
    return ""


def goes_on_or_says_why_not(place, monkeypatch, seed):
    """Look at a damaged run and go on with it; return what was done and what came of it."""
    run, what, path = damaged(place, monkeypatch, seed)
    before = content_of(run)
    former = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(LONGEST_S)
    try:
        assert [found.path for found in statuses([run])] == [run] or "logs" in what, what
        told = go_on(run)
        statuses([run])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    kept = content_of(run)
    for file, content in before.items():
        if "step-00000002" in str(file) and "step-00000002" not in str(path):  # else it is made again
            assert kept.get(file) == content, f"{what}: {file} is lost; {told}"
        is_beside = path.name in file.name and path.name != file.name and "step-" not in str(file)
        if is_beside or ("somebody's" in str(file) and path.parent.parent.name != "checkpoints"):  # else made again
            assert kept.get(file) == content, f"{what}: {file} is lost; {told}"
    return what, told


SEEDS = (0, 1, 2, 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_run_goes_on_or_says_why_not(seed, place, monkeypatch):
    goes_on_or_says_why_not(place, monkeypatch, seed)


@pytest.mark.parametrize(
    "number", [pytest.param(30, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.matrix)]
)
def test_many_damaged_runs_go_on_or_say_why_not(number, place, monkeypatch):
    outcomes = {seed: goes_on_or_says_why_not(place, monkeypatch, seed) for seed in range(100, 100 + number)}
    num_told = sum(bool(told) for _, told in outcomes.values())
    print(json.dumps(outcomes, indent=1), f"{num_told} of {len(outcomes)} told, the others went on")
    assert number / 10 <= num_told <= 9 * number / 10
