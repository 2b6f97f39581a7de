"""`mtp report compare` over files that are not what a run writes: three parts, and nothing written."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtp_lightning.cli.app import app
from mtp_lightning.errors import RunFolderError

SUMMARY = {"recipe": "mine", "seed": 0, "num_offsets": 2}
METRICS = "step,tokens,val/loss_1,val/loss_2,val/acceptance_rate_2\n4,2048,3.5,3.75,0.5\n"


def make_run(folder: Path, **changes: object) -> Path:
    """Write the two files of a run that are read; None leaves a field of the summary out."""
    folder.mkdir()
    told = {name: value for name, value in (SUMMARY | changes).items() if value is not None}
    (folder / "summary.json").write_text(json.dumps(told))
    (folder / "metrics.csv").write_text(METRICS)
    return folder


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", "compare", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    """Compare in vain; return what is said."""
    result = compare(*arguments)
    assert result.exit_code == RunFolderError.exit_code, result.exception or result.output
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["error:", "found", "hint"]
    assert result.stdout == ""
    return result.stderr


def test_sound_files_are_compared(tmp_path: Path) -> None:
    result = compare(make_run(tmp_path / "run"), "--json", tmp_path / "out.json", "--plot", tmp_path / "new/out.png")
    assert result.exit_code == 0, result.exception
    assert "3.5000" in result.stdout
    assert json.loads((tmp_path / "out.json").read_text())[0]["recipe"] == "mine"
    assert (tmp_path / "new/out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{", "no JSON"),
        (b"[]", "a list in place of an object"),
        (b"{}", "recipe: null"),
        (b"null", "null in place of an object"),
        (b"\xff", "bytes that are not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
    ids=["brace", "list", "empty", "null", "bytes", "deep", "digits"],
)
def test_broken_summaries_are_named(tmp_path: Path, content: bytes, found: str) -> None:
    (make_run(tmp_path / "run") / "summary.json").write_bytes(content)
    said = refusal(make_run(tmp_path / "sound"), tmp_path / "run", "--json", tmp_path / "out.json")
    assert found in said
    assert "summary.json" in said
    assert str(tmp_path / "run") in said
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"recipe": 5}, "recipe: 5"),
        ({"recipe": ["mine"]}, "recipe: a list"),
        ({"seed": None}, "seed: null"),
        ({"seed": "0"}, "seed: '0'"),
        ({"seed": True}, "seed: True"),
        ({"num_offsets": 10**9}, "num_offsets: 1000000000"),
        ({"num_offsets": 0}, "num_offsets: 0"),
        ({"num_offsets": 2.0}, "num_offsets: 2.0"),
    ],
)
def test_fields_of_other_types_are_named(tmp_path: Path, changes: dict[str, object], found: str) -> None:
    assert found in refusal(make_run(tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("step,val/loss_1\n4,3.5\n", "tokens: null"),
        ("step,tokens,val/loss_1\n4,inf,3.5\n", "tokens: inf"),
        ("step,tokens\n4,2048\n", "no validation"),
        ("", "no validation"),
        ("\0,\r,\n\xff\n", "no validation"),
    ],
)
def test_tables_without_what_is_needed(tmp_path: Path, content: str, found: str) -> None:
    (make_run(tmp_path / "run") / "metrics.csv").write_text(content, newline="")
    assert found in refusal(tmp_path / "run")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["summary.json", "metrics.csv"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = make_run(tmp_path / "run") / name
    path.unlink()
    os.mkfifo(path)
    assert f"a FIFO or a device in place of a file, in {path}" in refusal(tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "target", "found"),
    [
        ("--json", "", "a folder"),
        ("--json", "file/out.json", "beneath the file"),
        ("--json", "x" * 300, "File name too long"),
        ("--plot", "", "a folder"),
        ("--plot", "file/a/out.png", "beneath the file"),
        ("--plot", "out.xyz", "out.xyz"),
        ("--plot", "out", "out"),
    ],
)
def test_targets_are_looked_at_before_the_runs(tmp_path: Path, option: str, target: str, found: str) -> None:
    (tmp_path / "file").write_text("")
    said = refusal(tmp_path / "no run", option, tmp_path / target)
    assert option in said.splitlines()[0]
    assert found in said.splitlines()[1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_target_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert "no permission" in refusal(tmp_path, "--json", tmp_path / "out.json")


def test_names_of_others_are_shown_and_drawn_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", recipe="a\x1b[2J\r\u202e $x_{ $y")
    result = compare(run, "--plot", tmp_path / "out.png")
    assert result.exit_code == 0, result.exception
    assert r"a\x1b[2J\r\u202e $x_{ $y" in result.stdout
    assert (tmp_path / "out.png").exists()
    (tmp_path / "\x1b[2J").mkdir()
    assert r"\x1b[2J" in refusal(tmp_path / "\x1b[2J")
