"""The command starts, says what it can do, and is installed under its name."""

import signal
import subprocess
import sys
from importlib.metadata import entry_points

from typer.testing import CliRunner

from mtp_lightning import __version__
from mtp_lightning.__main__ import main as loaded_main
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
    assert script.load() in (main, loaded_main)  # an environment may have been installed before the second


def test_an_interrupt_while_the_program_is_loaded_is_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'mtp_lightning.cli.app':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from mtp_lightning.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")
