"""Names from outside on the screen: control characters as escapes, brackets and colons as they are, at every place."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.text import Text
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.console.errors import screen, table_of
from mtp_lightning.console.plots import label_of
from mtp_lightning.console.progress import counted, say, watched
from mtp_lightning.console.screen import Screen
from mtp_lightning.console.tables import build_table
from tests.data.corpora import build_tiny, write_corpus

HOSTILE = "a\x1b[2J\x1b]0;t\u202e[/x][red]:smile: $\\frac$ {b}"
PLAIN = r"a\x1b[2J\x1b]0;t\u202e[/x][red]:smile: $\frac$ {b}"


def invoke(*words: object) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.output


def assert_harmless(said: str) -> None:
    assert all(one.isprintable() or one in "\n\t" for one in said), ascii(said)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose texts are hostile, as YAML writes them."""
    path = tmp_path_factory.mktemp("recipe") / "a.yaml"
    path.write_text(yaml.safe_dump({"name": HOSTILE, "logging": {"tags": [HOSTILE]}}, allow_unicode=False))
    return path


@pytest.mark.parametrize("verb", ["plan", "recipe show", "recipe check", "recipe diff"])
def test_texts_of_recipes(verb: str, recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.yaml"
    other.write_text("name: b\n")
    said = invoke(*verb.split(), recipe, *([other] if verb == "recipe diff" else []))
    assert_harmless(said)


def test_names_of_folders_and_sources(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    folder = tmp_path / HOSTILE.replace("/", "")
    build_tiny([str(tmp_path / "corpus")], tmp_path / "shards")
    shutil.move(tmp_path / "shards", folder)
    for words in (("stats", folder), ("stats", folder, "--picture", tmp_path / "x.png"), ("verify", folder)):
        said = invoke("data", *words)
        assert_harmless(said)
        assert PLAIN.replace("/", "")[:20] in said.replace("\n", "")
    assert (tmp_path / "x.png").exists()
    (folder / "manifest.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    assert_harmless(invoke("data", "verify", folder))


PRINTED: dict[str, Callable[[Screen], None]] = {
    "text": lambda console: console.print(HOSTILE),
    "styled": lambda console: console.print(Text(HOSTILE, style="bold red")),
    "assembled": lambda console: console.print(Text.assemble((HOSTILE, "cyan"), HOSTILE)),
    "table of figures": lambda console: console.print(_table(build_table([HOSTILE], left=0, gap=1))),
    "table": lambda console: console.print(_table(table_of([HOSTILE]))),
}


def _table(table: object) -> object:
    table.add_row(HOSTILE)  # type: ignore[attr-defined]
    return table


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("printed", PRINTED)
def test_whatever_is_printed(printed: str, is_terminal: bool) -> None:
    file = io.StringIO()
    PRINTED[printed](
        Screen(file=file, force_terminal=is_terminal, width=300, color_system="standard" if is_terminal else None)
    )
    said = file.getvalue()
    assert PLAIN[: 20 if "table" in printed else None] in said, "rich counts no cells for controls"
    for colour in ("\x1b[1;31m", "\x1b[1m", "\x1b[36m", "\x1b[0m"):  # our own, on terminals only
        said = said.replace(colour, "") if is_terminal else said
    assert_harmless(said)


def test_lines_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    screen().print(HOSTILE)
    with watched(HOSTILE, total_bytes=3, show=True) as advance:
        advance(3)
    with counted(HOSTILE, total=3, unit="x") as advance:
        advance(3)
    said = capsys.readouterr()
    assert said.out == f"{PLAIN}\n" * 2
    assert_harmless(said.err)


def test_labels_of_pictures() -> None:
    assert label_of(HOSTILE) == PLAIN.replace("$", r"\$")
