"""The reference pages say what the program says."""

import doctest

import pytest

from docs import generate
from docs.generate import FOLDER, NOTE, SERVE, cell, pages, serve_page, slug
from mtp_lightning.recipe.schema.field_types import fields
from tests.docs import documents

PAGES = pages()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_would_be_written_now(name):
    path = FOLDER / name
    assert path.is_file(), f"{path} is missing: run python docs/generate.py"
    assert path.read_text(encoding="utf-8") == PAGES[name], f"{path} is stale: run python docs/generate.py"
    assert NOTE in PAGES[name]


def test_the_tables_of_formats_are_those_of_the_program():
    assert SERVE.read_text(encoding="utf-8") == serve_page(), (
        "docs/howto/serve.md is stale: run python docs/generate.py"
    )
    assert "| medusa |" in serve_page()


@pytest.mark.parametrize("module", [generate, documents], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_true(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_nothing_else_is_among_them():
    assert {path.name for path in FOLDER.iterdir()} == PAGES.keys()


def test_every_field_and_every_code_is_there():
    text = PAGES["recipe.md"]
    assert [place.names for place in fields() if f"| `{place.names[-1]}` |" not in text] == []
    codes = {line.split("|")[1].strip() for line in PAGES["errors.md"].splitlines() if line.startswith("|")}
    assert {"0", "1", "2", "3", "4", "5", "6", "7", "8", "85", "86", "87", "88", "89", "130", "141"} <= codes


def test_cells_and_anchors_are_as_github_reads_them():
    assert cell("a | b <c> `d|e <f>`\n* g") == r"a \| b &lt;c> `d\|e <f>` \* g"
    assert slug("objective.weights, kind decay") == "objectiveweights-kind-decay"


@pytest.mark.parametrize("name", PAGES)
def test_every_row_has_as_many_cells_as_its_header(name):
    width = 0
    for line in PAGES[name].splitlines():
        num_cells = line.replace(r"\|", "").count("|")
        if num_cells and line.startswith("|"):
            width = width or num_cells
            assert num_cells == width, line
        else:
            width = 0
