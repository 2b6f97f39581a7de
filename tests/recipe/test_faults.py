"""Law: every fault in the catalogue produces its recorded message."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mtp_lightning.console.errors import error_lines
from mtp_lightning.errors import RecipeError
from mtp_lightning.recipe import Recipe, check_rules, head_kinds, load_recipe
from mtp_lightning.recipe.loading.load import fault_lines
from mtp_lightning.recipe.rules.all import RULES
from tests.recipe.catalogue import CASES, RECIPE, Case
from tests.recipe.catalogue import RULES as RULE_CASES
from tests.recipe.golden import GOLDEN, assert_golden

WIDTH = 100
JARGON = (
    "pydantic",
    "http",
    "Input should",
    "validation error",
    "Traceback",
    "None",
    "literal",
    "dict",
    "<block",
    "<stream",
)


def load_case(case: Case) -> RecipeError:
    """Write the files of a case into the current folder and return the error that loading raises."""
    for name, text in case.files.items():
        Path(name).write_text(text, encoding="utf-8")
    if isinstance(case.text, bytes):
        Path(RECIPE).write_bytes(case.text)
    elif case.text is not None:
        Path(RECIPE).write_text(case.text, encoding="utf-8")
    with pytest.raises(RecipeError, match="must be valid as a whole") as caught:
        load_recipe(RECIPE, case.overrides)
    return caught.value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault_has_its_recorded_message_in_plain_words(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = load_case(case)
    for fault in error.faults:
        text = "\n".join(fault_lines(fault))
        assert not [word for word in JARGON if word in text]
        assert fault.expected.startswith("must ")
        assert all((fault.found, fault.origin))
        assert fault.hint.endswith(".")
    text = "".join(f"{line.plain}\n" for line in error_lines(error, WIDTH))
    assert_golden(f"recipe_faults/{case.name}.txt", text)


def test_every_recorded_message_belongs_to_a_case() -> None:
    recorded = {path.stem for path in (GOLDEN / "recipe_faults").glob("*.txt")}
    assert recorded == {case.name for case in CASES}
    assert len(recorded) == len(CASES)


def test_every_rule_has_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    met = {fault.expected for case in RULE_CASES for fault in load_case(case).faults}
    own = cast(head_kinds.HeadKind, SimpleNamespace(num_layers=lambda *_: 0))
    monkeypatch.setitem(head_kinds._registered, "own", own)
    sections = {
        "heads": {"kind": "own"},
        "optimizer": {"mup_base_width": 128},
        "strategy": {"kind": "zero2", "ranks_per_node": 2, "sequence_parallel": 2},
    }
    met |= {fault.expected for fault in check_rules(Recipe.model_validate(sections))}
    assert met == {rule.expected for rule in RULES}


def test_defaults_break_no_rule() -> None:
    assert check_rules(Recipe()) == []


def test_error_spells_its_faults_out_without_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = load_case(CASES[-1])
    assert len(error.__notes__) == len(error.faults) > 4
    assert "nearest: num_offsets" in "\n".join(error.__notes__)


def test_faults_come_in_the_order_of_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    origins = [fault.origin for fault in load_case(CASES[-1]).faults]
    assert origins == [
        "base.yaml:2",
        "base.yaml:3",
        "recipe.yaml:3",
        "recipe.yaml:5",
        "recipe.yaml:7",
        "command line",
    ]
