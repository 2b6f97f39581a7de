"""Sweeps on paper: which runs there are, in which order, and what is refused before the first one starts."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mtp_lightning.errors import LaunchError, RecipeError, RunFolderError
from mtp_lightning.files.lock import try_lock
from mtp_lightning.launch.run_marker import claim, is_run
from mtp_lightning.launch.site import load_site
from mtp_lightning.launch.submission import prepare
from mtp_lightning.launch.sweep import begin_sweep, default_folder, folder_name, members_of, plan_sweep, sweep_points
from mtp_lightning.launch.sweep_training import state_of
from mtp_lightning.recipe import Recipe, load_recipe, recipe_to_yaml
from tests.recipe.golden import assert_golden
from tests.support.runs import ROOT

RECIPES = {
    "plain": "run: {steps: 8}",
    "lower": "extends: plain.yaml\noptimizer: {lr: 1.0e-5}",
    "faulty": "run: {stepz: 3}\nheads: {num_offsets: 0}",
    "next": "init: {path: 'out/plain/seed{seed}/checkpoints/step-00000008'}",
    "last": "init: {path: 'out/next/seed{seed}'}",
    "chicken": "init: {path: out/egg/seed0}",
    "egg": "init: {path: out/chicken/seed0}",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with recipes."""
    monkeypatch.chdir(tmp_path)
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\n{text}\n")
    return tmp_path


def plan(*arguments, seeds="1", vary=(), **options):
    paths = [word if "=" in word else f"{word}.yaml" for word in arguments]
    return plan_sweep(paths, seeds=seeds, vary=vary, out=Path("out"), **options)


def test_points() -> None:
    assert sweep_points([]) == [[]]
    assert sweep_points(["a=1,2", "b=x,y"]) == [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]
    assert sweep_points(["o.betas=[0.9,0.95],[0.8,0.9]"]) == [["o.betas=[0.9,0.95]"], ["o.betas=[0.8,0.9]"]]
    assert folder_name(["run.dir=../../etc"]) == "run.dir=.._.._etc"


@pytest.mark.parametrize("sweep", ["a", "a=", "=1", "a=1,,2", "a=1,1"])
def test_wrong_values_are_refused(sweep: str) -> None:
    with pytest.raises(LaunchError, match="--vary must"):
        sweep_points([sweep])


def test_a_member_is_the_recipe_with_its_values_and_seed(here: Path) -> None:
    members = plan("plain", "lower", "optimizer.warmup_steps=3", seeds="4,1", vary=["heads.num_offsets=2,3"])
    assert [member.name for member in members] == [
        f"{name}-heads.num_offsets={n}/seed{seed}" for seed in (4, 1) for n in (2, 3) for name in ("plain", "lower")
    ]
    for member in members:
        name, seed = member.name.split("/")
        own = (f"name={name}", f"run.seed={seed[4:]}", f"run.dir={here}/out/{member.name}", name.partition("-")[2])
        expected = load_recipe(f"{name.partition('-')[0]}.yaml", ["optimizer.warmup_steps=3", *own]).recipe
        assert member.recipe == expected


def test_a_folder_stands_for_its_recipes_and_a_run_folder_for_its_own(here: Path) -> None:
    (here / "own/deeper").mkdir(parents=True)
    for name in ("own/b", "own/a", "own/deeper/c"):
        (here / f"{name}.yaml").write_text(f"extends: {here}/plain.yaml\nname: {name[-1]}\n")

    def names(*arguments: str) -> list[str]:
        return [member.recipe.name for member in plan_sweep(arguments, seeds="1", vary=[], out=Path("out"))]

    assert names("own", "lower.yaml") == ["a", "b", "lower"]
    (here / "own/recipe.yaml").write_text(f"extends: {here}/plain.yaml\nname: run\n")
    with pytest.raises(RecipeError, match=r"fault \(own\)"):
        names("own")
    (here / "own/recipe.yaml").unlink()
    (here / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"fault \(empty\)"):
        names("empty")


def test_recipes_are_laid_over_a_model_and_start_from_it(here: Path) -> None:
    (here / "model").mkdir()
    (here / "model/recipe.yaml").write_text(
        "name: model\nmodel: {hidden_size: 64}\nrun: {steps: 5}\ninit: {path: elsewhere}\n"
    )
    (member,) = plan("lower", base=Path("model"))
    assert (member.name, member.recipe.model.hidden_size, member.recipe.run.steps) == ("lower/seed0", 64, 8)
    assert member.recipe.init.path == "model"
    with pytest.raises(RecipeError, match="recipe.yaml"):
        plan("lower", base=Path("nowhere"))


def test_a_run_comes_after_the_one_that_it_starts_from() -> None:
    members = plan("last", "next", "plain", seeds="0,1")
    names = [member.name for member in members]
    assert names[:2] == ["plain/seed0", "plain/seed1"]
    assert sorted(names, key=lambda name: ("plain", "next", "last").index(name.partition("/")[0])) == names
    starts = {member.name: member.starts_from for member in members}
    assert [starts[f"{name}/seed1"] for name in ("plain", "next", "last")] == [None, "plain/seed1", "next/seed1"]
    assert members[-1].recipe.init.path == "out/next/seed1"
    assert plan("last", is_later=True)[0].starts_from is None
    with pytest.raises(RecipeError) as caught:
        plan("last")
    (fault,) = caught.value.faults
    assert (fault.path, fault.found) == ("init.path", "out/next/seed0, of last/seed0")


@pytest.mark.parametrize(
    ("arguments", "options", "path", "words"),
    [
        ((), {}, "RECIPE", "at least once"),
        (("plain", "faulty"), {}, "run.stepz", ""),
        (("plain", "plain"), {}, "name", "plain/seed0 twice"),
        (("plain", "lower", "name=same"), {}, "name", "same/seed0 twice"),
        (("plain",), {"vary": ["data.corpus=[a/b],[a b]"]}, "name", "differ in letters"),
        (("plain", "run.dir=x"), {}, "run.dir", "Give --out"),
        (("plain",), {"vary": ["run.seed=1,2"]}, "run.seed", "Give --seeds"),
        (("plain", "run.restart=true"), {}, "run.restart", "another --out"),
        (("chicken", "egg"), {}, "init.path", "must not lead back"),
    ],
)
def test_faults_of_all_members_are_told_together(arguments, options, path, words) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(*arguments, **options)
    faults = {fault.path: f"{fault.expected} {fault.found} {fault.hint}" for fault in caught.value.faults}
    assert words in faults[path]
    if "faulty" in arguments:
        assert "heads.num_offsets" in faults


@pytest.mark.parametrize("seeds", ["", ",", "0", "1001", "1,1", "1,01", "x", "-1", "1.5", "1,,2"])
def test_wrong_seeds_are_refused(seeds: str) -> None:
    with pytest.raises(LaunchError, match="--seeds must be how many"):
        plan("plain", seeds=seeds)


def test_a_number_alone_is_how_many_seeds() -> None:
    names = {text: [member.name for member in plan("plain", seeds=text)] for text in ("1", "3", "2,", " 4, 2 ")}
    of_seeds = {"1": "0", "3": "012", "2,": "2", " 4, 2 ": "42"}
    assert names == {text: [f"plain/seed{seed}" for seed in seeds] for text, seeds in of_seeds.items()}


def test_a_sweep_of_several_recipes_needs_a_folder() -> None:
    assert default_folder(["a/b.yaml", "x=1"]) == Path("runs/sweeps/b")
    for arguments in (["a", "b"], [], ["/"]):
        with pytest.raises(LaunchError, match="Give --out"):
            default_folder(arguments)


def test_names_stay_beneath_the_sweep(here: Path) -> None:
    for name in ("../../up", "..", ".hidden", "a/b"):
        (member,) = plan("plain", f"name={name}")
        assert member.folder.resolve().parents[1] == here / "out"
        begin_sweep(here / "out", [member])
    assert len(members_of(here / "out")) == 4


def test_members_may_be_added_and_not_changed(here: Path) -> None:
    out = here / "out"
    begin_sweep(out, plan("plain"))
    assert load_recipe(out / "plain/seed0/recipe.yaml").recipe == plan("plain")[0].recipe
    begin_sweep(out, plan("lower", "plain", seeds="0,1"))
    begin_sweep(out, plan("lower"))
    names = ["plain/seed0", "lower/seed0", "lower/seed1", "plain/seed1"]
    assert members_of(out) == [out / name for name in names]
    assert all(is_run(member) for member in members_of(out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match=r"plain/seed1: run.steps: 8 -> 9") as caught:
        begin_sweep(out, plan("plain", "run.steps=9", seeds="1,2"))
    assert "may be added" in caught.value.hint
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_of_somebody_else_is_left_alone(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out/thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="--out must be a new folder") as caught:
        begin_sweep(here / "out", plan("plain"))
    assert caught.value.hint.startswith("Give a new --out.")
    assert [path.name for path in (here / "out").iterdir()] == ["thesis.tex"]
    assert members_of(here) == members_of(here / "nowhere") == []


def test_states(here: Path) -> None:
    members = plan("plain", seeds="0,1,2")
    begin_sweep(here / "out", members)
    done, stopped = (member.folder for member in members[:2])
    for folder in (done, stopped):
        (folder / "logs/attempt_1").mkdir(parents=True)
    (done / "checkpoints/step-00000008").mkdir(parents=True)
    (done / "summary.json").write_text('{"is_finished": true}')
    assert [state_of(member) for member in members] == ["finished", "stopped", "new"]


def test_a_claimed_folder_without_a_recipe_is_a_new_member(here: Path) -> None:
    (member,) = plan("plain")
    claim(member.folder)
    begin_sweep(here / "out", [member])
    assert (member.folder / "recipe.yaml").read_text() == recipe_to_yaml(member.recipe) != recipe_to_yaml(Recipe())


def test_a_sweep_that_another_begins_at_the_same_time_waits_for_it(here: Path) -> None:
    """In between, a run's folder lies there which nothing says is a run's."""
    (member,) = members = plan("plain")
    member.folder.mkdir(parents=True)
    first = os.open(here / "out", os.O_RDONLY)
    assert try_lock(first)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(begin_sweep, here / "out", members)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        claim(member.folder)
        os.close(first)
        second.result()
    assert (member.folder / "recipe.yaml").is_file()


def test_the_script_of_a_sweep(here: Path) -> None:
    members = plan(
        "plain", "strategy.kind=zero1", "batch.micro_batch_size=1", seeds="0,1", vary=["optimizer.lr=1e-4,3e-4"]
    )
    site = load_site(str(ROOT / "cluster/sites/local.yaml"))
    recipes = [member.recipe for member in members]
    submission = prepare(recipes, site, "local", folder=Path("out"), name="out", then=["eval marginal {run}"])
    assert submission.follow_script is not None
    assert_golden("sbatch/sweep_array.sh", submission.script.replace(str(here), "/here"))
    wider = plan("lower", "strategy.kind=zero1", "strategy.ranks_per_node=2", "batch.micro_batch_size=1")
    with pytest.raises(LaunchError, match="equally many ranks"):
        prepare([*recipes, wider[0].recipe], site, "local", folder=Path("out"), name="out")


def test_long_values_make_names_that_file_systems_take(here: Path) -> None:
    long = "é" * 300
    members = plan("plain", vary=[f"run.sample={long}a,{long}b"])
    begin_sweep(Path("out"), members)
    assert len({member.name for member in members}) == 2
    assert all(member.folder.is_dir() for member in members)
