"""Failures that a user can cause end as three parts and an exit code; everything else is a traceback."""

import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import mtp_lightning.errors
from mtp_lightning.cli.app import MtpGroup, app, main
from mtp_lightning.console.errors import error_lines
from mtp_lightning.errors import DataError, MtpError, NonFiniteError, RunFolderError

KINDS = [kind for kind in vars(mtp_lightning.errors).values() if isinstance(kind, type) and issubclass(kind, MtpError)]


def run_failing(error: BaseException) -> Result:
    """Run a verb that raises an error, under the group that all verbs are under."""
    failing = typer.Typer(cls=MtpGroup, pretty_exceptions_enable=False)
    failing.callback()(lambda: None)

    @failing.command()
    def verb() -> None:
        raise error

    return CliRunner().invoke(failing, ["verb"])


def test_error_is_printed_in_three_parts() -> None:
    result = run_failing(DataError("a corpus must hold text", "no file in src", "Give another folder"))
    assert result.exit_code == DataError.exit_code
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: a corpus must hold text",
        "  found    no file in src",
        "  hint     Give another folder.",
    ]


def test_traceback_is_printed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_TRACEBACK", "1")
    result = run_failing(NonFiniteError("a loss must be finite", "nan", "Lower optimizer.lr."))
    assert result.exit_code == NonFiniteError.exit_code
    assert "Traceback (most recent call last)" in result.stderr
    assert "error: a loss must be finite" in result.stderr


def test_interrupt_is_one_line() -> None:
    result = run_failing(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_bugs_are_not_dressed_up() -> None:
    result = run_failing(ZeroDivisionError("a bug"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_exit_codes_differ_from_success() -> None:
    assert len(KINDS) >= 7
    assert all(kind.exit_code not in (0, 130) for kind in KINDS)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_long_words_stay_whole_and_the_rest_wraps(width: int) -> None:
    path = "/".join(["folder"] * 30)
    error = RunFolderError(
        "a run folder must be writable " * 5, f"{path} on a full disk", "Free some space there. " * 5
    )
    lines = [line.plain for line in error_lines(error, width)]
    assert any(path in line for line in lines)
    assert all(len(line) <= max(width, 31) for line in lines if path not in line)


def test_lines_of_a_listing_stay_lines() -> None:
    error = RunFolderError("the recipe must be the same", "2 changes:\n  run.seed: 1 -> 2\n  name: a -> b\n", "Undo.")
    assert [line.plain for line in error_lines(error, 80)][1:4] == [
        "  found    2 changes:",
        "             run.seed: 1 -> 2",
        "             name: a -> b",
    ]


def test_markup_in_a_message_is_text() -> None:
    result = run_failing(DataError("a name must be plain", "[bold]x[/bold] :smile:", "Rename."))
    assert "[bold]x[/bold] :smile:" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["recipe", "show"],
        ["bench", "memory", "r.yaml", "--offsets", "1,x"],
        ["bench", "memory", "r.yaml", "--offsets", "0"],
        ["bench", "train", "r.yaml", "--backward-orders", "sequental"],
        ["data", "build", "some/folder"],
        ["data", "build", "r.yaml", "--validation-fraction", "0.1"],
        ["data", "build", "some/folder", "--out", "shards", "--validation-fraction", "1"],
        ["data", "peek", "r.yaml", "--split", "test"],
    ],
)
def test_wrong_usage_is_said_so(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.parametrize(
    "verb", [["train"], ["data", "build"], ["data", "peek"], ["bench", "memory"], ["bench", "train"]]
)
def test_every_verb_reports_a_faulty_recipe_before_it_starts(verb: list[str]) -> None:
    result = CliRunner().invoke(app, [*verb, "nowhere.yaml", "run.steps"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: 2 faults to correct\n")


def test_main_exits_with_the_code_of_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mtp", "recipe", "check", "nowhere.yaml"])
    with pytest.raises(SystemExit) as exit_request:
        main()
    assert exit_request.value.code == 2
    assert "nowhere.yaml must be a recipe" in capsys.readouterr().err
