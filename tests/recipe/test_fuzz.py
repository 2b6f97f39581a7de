"""No value, file or nesting ends in anything but a recipe or its faults, and none takes long."""

import random
from pathlib import Path

import pytest

from mtp_lightning.errors import SiteError
from mtp_lightning.launch.site import Site, load_site
from tests.recipe.fuzzing import WRONG_VALUES, Tally, at_most, is_whole, mutated, paths

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SECONDS = 2.0  # of this process alone; thousands of brackets take 0.4, and endless work any time


def overrides(tally: Tally, share: float, folder: Path) -> Tally:
    """Try a share of all wrong values on all fields; below phases, a quarter of it."""
    draw = random.Random(20261127)
    base = folder / "base.yaml"
    base.write_text("name: base\n")
    for path in paths():
        for value in WRONG_VALUES:
            if draw.random() < (share / 4 if path.startswith("phases.a.") else share):
                tally.add(base, (f"{path}={value}",), f"{path}={value[:60]!r}")
    return tally


def files(tally: Tally, count: int, folder: Path) -> Tally:
    draw = random.Random(20261127)
    for _ in range(count):
        source = draw.choice(RECIPES)
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = mutated(source.read_text(), draw)
        target.write_bytes(content)
        tally.add(target, (), repr(content))
        target.write_bytes(source.read_bytes())
    return tally


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for source in RECIPES:
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return tmp_path


def test_some_wrong_values_and_damaged_files_are_told_in_words(folder: Path) -> None:
    tally = files(overrides(Tally(SECONDS), 0.006, folder), 100, folder)
    assert not tally.broken
    assert min(tally.right, tally.refused) > 10


@pytest.mark.parametrize(
    "share", [pytest.param(0.08, marks=pytest.mark.slow), pytest.param(0.25, marks=pytest.mark.matrix)]
)
def test_wrong_values_of_every_field_are_told_in_words(share: float, folder: Path) -> None:
    tally = overrides(Tally(SECONDS), share, folder)
    assert not tally.broken
    assert tally.right + tally.refused > 24_000 * share


@pytest.mark.parametrize(
    "number", [pytest.param(1500, marks=pytest.mark.slow), pytest.param(5000, marks=pytest.mark.matrix)]
)
def test_damaged_files_are_told_in_words(number: int, folder: Path) -> None:
    assert not files(Tally(SECONDS), number, folder).broken


def test_some_wrong_values_of_a_site_are_told_in_words() -> None:
    draw = random.Random(20261127)
    refused: list[SiteError] = []
    for key in [*Site.model_fields, "container.image", "interconnect.A", "nothing"]:
        for value in draw.sample(WRONG_VALUES, 12):
            with at_most(SECONDS):
                try:
                    load_site("local", [f"{key}={value}"])
                except SiteError as error:
                    refused.append(error)
    assert len(refused) > 200
    assert all(map(is_whole, refused))
