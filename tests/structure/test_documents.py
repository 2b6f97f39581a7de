"""Every field is documented, and every relative link leads somewhere."""

from pathlib import Path

import pytest

from mtp_lightning.recipe.schema.base import Section
from mtp_lightning.recipe.schema.root import Recipe
from tests.docs.documents import links
from tests.structure.source import ROOT

SKIPPED = {"build", "dist", "runs", "node_modules"}
PAGES = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in SKIPPED for part in page.relative_to(ROOT).parts)
]


def sections_below(section: type[Section]) -> list[type[Section]]:
    """List all sections."""
    subclasses = section.__subclasses__()
    return [*subclasses, *(below for subclass in subclasses for below in sections_below(subclass))]


def test_there_are_sections() -> None:
    assert {Recipe} < set(sections_below(Section))
    assert len(sections_below(Section)) >= 13


@pytest.mark.parametrize("section", sections_below(Section), ids=lambda section: section.__name__)
def test_every_field_is_documented(section: type[Section]) -> None:
    undocumented = [name for name, field in section.model_fields.items() if not field.description and name != "kind"]
    assert undocumented == []
    assert section.__doc__ != Section.__doc__


def test_there_are_pages() -> None:
    assert {"README.md", "CHANGELOG.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in links(page.read_text(encoding="utf-8")) if "://" not in target]
    files = [target.partition("#")[0] for target in targets if not target.startswith(("#", "mailto:"))]
    assert not [file for file in files if not (page.parent / file).exists()]
