"""A login node without torch can plan, check recipes and read help."""

import subprocess
import sys

import pytest

from tests.structure.source import FILES, PACKAGE, ROOT, imports_of, module_of

HEAVY = ("torch", "numpy", "lightning", "torchmetrics", "webdataset", "safetensors", "matplotlib")
TORCH_FREE = ("errors.py", "files", "recipe", "planner", "launch", "cli")
MODULES = [module_of(path) for path in FILES if path.relative_to(PACKAGE).parts[0] in TORCH_FREE]


def loaded_by(code: str) -> str:
    """Run code in a fresh process and return the heavy libraries that it loaded."""
    report = f"\nimport sys; print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_torch_free_packages_load_nothing_heavy() -> None:
    assert len(MODULES) > 15
    assert loaded_by("\n".join(f"import {name}" for name in MODULES)) == "loaded:"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["recipe", "check", "recipes/quickstart.yaml"],
        ["recipe", "show", "recipes/quickstart.yaml"],
        ["train", "recipes/nowhere.yaml"],
        ["plan", "recipes/quickstart.yaml"],
    ],
    ids=" ".join,
)
def test_command_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from mtp_lightning.cli.app import main
sys.argv = ["mtp", *{arguments}]
try:
    main()
except SystemExit:
    pass
"""
    assert loaded_by(code) == "loaded:"


def test_the_page_of_runs_loads_nothing_heavy() -> None:
    """As `mtp status --html` is for login nodes, too."""
    assert loaded_by("import mtp_lightning.evaluation.run_page.write") == "loaded:"


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded_by("import numpy") == "loaded: numpy"


@pytest.mark.parametrize("room", ["errors.py", "files", "recipe", "planner", "launch"])
def test_torch_free_packages_name_nothing_heavy(room: str) -> None:
    files = [path for path in FILES if path.relative_to(PACKAGE).parts[0] == room]
    assert not [(path, name) for path in files for _, name in imports_of(path) if name.split(".")[0] in HEAVY]
