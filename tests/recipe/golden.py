"""Recorded texts: UPDATE_GOLDEN=1 rewrites them, a missing one is a failure."""

import os
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"


def assert_golden(name: str, text: str) -> None:
    """Compare a text with the recorded one."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} must be recorded: UPDATE_GOLDEN=1 pytest {__package__}"
    assert text == path.read_text(encoding="utf-8")
