"""`mtp recipe show | check | diff`, as they appear on the screen."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtp_lightning.cli.app import app
from mtp_lightning.recipe import load_recipe, recipe_to_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def mtp(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, list(arguments))


def test_show_prints_a_valid_recipe() -> None:
    result = mtp("recipe", "show", "recipes/debug/linear.yaml", "run.steps=40")
    expected = load_recipe("recipes/debug/linear.yaml", ["run.steps=40"]).recipe
    assert (result.exit_code, result.stdout) == (0, recipe_to_yaml(expected))


@pytest.mark.parametrize("option", ["--origin", "--docs"])
def test_show_with_comments_prints_the_same_recipe(option: str, tmp_path: Path) -> None:
    result = mtp("recipe", "show", "recipes/debug/sequential.yaml", option)
    copy = tmp_path / "copy.yaml"
    copy.write_text(result.stdout, encoding="utf-8")
    assert load_recipe(copy).recipe == load_recipe("recipes/debug/sequential.yaml").recipe


def test_show_says_where_values_come_from() -> None:
    lines = mtp("recipe", "show", "recipes/debug/linear.yaml", "run.seed=3", "--origin").stdout.splitlines()
    origins = {line.split(":")[0].strip(): line.partition("# ")[2] for line in lines if "# " in line}
    assert origins["seed"] == "command line"
    assert origins["order"] == "default"
    assert origins["name"].startswith("recipes/debug/linear.yaml:")
    assert origins["hidden_size"].startswith("recipes/debug/base.yaml:")


def test_show_says_what_fields_mean() -> None:
    assert "# Number n of predicted tokens" in mtp("recipe", "show", "recipes/quickstart.yaml", "--docs").stdout


def test_long_values_are_not_cut() -> None:
    folder = "/".join(["a long folder name"] * 30)
    result = mtp("recipe", "show", "recipes/quickstart.yaml", f"run.dir={folder}", "--origin")
    assert f"  dir: {folder} # command line" in result.stdout.splitlines()


def test_show_takes_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run: {dir: moved, seed: 5}\n", encoding="utf-8")
    result = mtp("recipe", "show", str(tmp_path))
    assert f"  dir: {tmp_path}\n" in result.stdout
    assert "  seed: 5\n" in result.stdout
    assert "  dir: elsewhere\n" in mtp("recipe", "show", str(tmp_path), "run.dir=elsewhere").stdout


def test_folder_that_is_no_run_folder_is_an_error(tmp_path: Path) -> None:
    result = mtp("recipe", "show", str(tmp_path))
    assert result.exit_code == 4
    assert f"no recipe.yaml in {tmp_path}" in result.stderr


def test_check_prints_a_line_for_each_recipe() -> None:
    files = ["recipes/quickstart.yaml", "recipes/debug/linear.yaml"]
    result = mtp("recipe", "check", *files)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "".join(f"ok      {file}\n" for file in files), "")


def test_check_gathers_the_faults_of_all_recipes_and_names_a_shared_one_once() -> None:
    files = ["recipes/quickstart.yaml", "recipes/debug/linear.yaml", "recipes/debug/medusa.yaml"]
    result = mtp("recipe", "check", *files, "run.setps=4", "data.seq_len=100")
    assert result.exit_code == 2
    assert result.stdout == "".join(f"faulty  {file}  (1)\n" for file in files)
    assert result.stderr.count("run.setps must be a field of run") == 1
    assert result.stderr.startswith("error: 1 fault to correct\n")


def test_check_goes_on_past_a_faulty_recipe() -> None:
    result = mtp("recipe", "check", "recipes/nowhere.yaml", "recipes/quickstart.yaml")
    assert result.exit_code == 2
    assert result.stdout == "faulty  recipes/nowhere.yaml  (1)\nok      recipes/quickstart.yaml\n"
    assert "no such file" in result.stderr


def test_diff_lists_the_fields_that_differ() -> None:
    result = mtp("recipe", "diff", "recipes/debug/parallel.yaml", "recipes/debug/linear.yaml")
    assert result.stdout.splitlines() == [
        "name        debug-parallel -> debug-linear",
        "heads.kind  parallel -> linear",
        "run.dir     runs/debug/parallel -> runs/debug/linear",
    ]


def test_diff_of_equal_recipes_says_so() -> None:
    assert mtp("recipe", "diff", *["recipes/quickstart.yaml"] * 2).stdout == "no field differs\n"


def test_a_check_of_nothing_is_refused() -> None:
    done = mtp("recipe", "check", "run.steps=5")
    assert done.exit_code == 2
    assert "RECIPE must be given at least once" in done.stderr


def test_a_recipe_may_come_from_a_pipe() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"name: piped\n")
    os.close(writing)
    done = mtp("recipe", "check", f"/dev/fd/{reading}")
    os.close(reading)
    assert (done.exit_code, done.stderr) == (0, "")
