"""The command starts, says what it can do, and is installed under its name."""

from importlib.metadata import entry_points

from typer.testing import CliRunner

from mtp_lightning import __version__
from mtp_lightning.cli.app import app, main


def test_help_names_every_verb() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert all(verb in text for verb in ("train", "data", "recipe", "bench"))


def test_no_arguments_print_the_help() -> None:
    assert "Usage: " in CliRunner().invoke(app, []).output


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"mtp {__version__}\n"


def test_console_script_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="mtp")
    assert script.load() is main
