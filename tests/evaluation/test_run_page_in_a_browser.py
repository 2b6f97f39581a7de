"""The page in a real browser: charts are drawn, nothing is asked of the network, no text of a run is run."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtp_lightning.evaluation.run_page.runs import find_runs, read_runs
from mtp_lightning.evaluation.run_page.write import page_of, write_page
from tests.evaluation.test_run_page import HOSTILE, drafts_with, write_hostile
from tests.support.browser import Browser
from tests.support.run_folders import write_run

CHARTS = "document.querySelectorAll('figure .plot svg[role=img]').length"
FIGURES = "document.querySelectorAll('figure').length"
WIDTH = "document.documentElement.scrollWidth"
PHONE = 390
CONTRAST = """(() => {
  const light = (name) => {
    const probe = document.createElement('i');
    probe.style.color = name.startsWith('--') ? `var(${name})` : name;
    document.body.append(probe);
    const parts = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light('--paper');
  return [0, 1, 2, 3, 4, 5, 6, 7].map((i) => light(`--c${i}`))
    .concat([light('--ink'), light('--soft')])
    .map((ink) => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
})()"""
"""Contrast of lines and texts with the paper, as WCAG 2 defines it."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose every text is hostile, of which one has sixteen offsets."""
    folder = tmp_path_factory.mktemp("pages")
    for number, text in enumerate(HOSTILE):
        write_hostile(folder / f"runs/{number}", text)
    write_run(folder / "runs/deep", num_offsets=16, attempts=2)
    runs = read_runs(find_runs([folder / "runs"]))
    write_page(runs, folder / "page.html", drafts=[draft for text in HOSTILE for draft in drafts_with(text)])
    return folder / "page.html"


def test_hostile_runs_are_drawn_and_nothing_else_happens(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.said == []
    assert browser.requested == [page.as_uri()]
    assert browser.value(CHARTS) == browser.value(FIGURES) > 40
    assert browser.value("document.querySelectorAll('img, iframe, script').length") == 4
    assert browser.value("document.querySelectorAll('figure .ends text').length") > 100


def test_what_is_injected_does_not_run_and_is_noticed(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The policy stops it, and these tests would see it: a script, a picture from elsewhere, a handler."""
    spoilt = page.read_text().replace(
        "</h1>", "</h1><script>window.hit = 1</script><img src='https://example.org/a.png' onerror='window.hit = 2'>", 1
    )
    (tmp_path / "page.html").write_text(spoilt)
    browser.open(tmp_path / "page.html")
    assert browser.value("typeof window.hit") == "undefined"
    assert len([line for line in browser.said if "Content Security Policy" in line]) >= 2


@pytest.mark.slow
def test_runs_can_be_switched_off(browser: Browser, page: Path) -> None:
    browser.open(page)
    lines = "document.querySelector('figure .ends').children.length"
    before = browser.value(lines)
    browser.value("document.querySelector('#runs tbody input').click()")
    settled = "new Promise((done) => setTimeout(() => requestAnimationFrame(() => setTimeout(done, 50)), 50))"
    browser.value(settled)
    assert browser.value(lines) == before - 2  # its label, and the line to it
    browser.value("document.querySelector('#all').click()")
    browser.value(settled)
    assert browser.value("document.querySelectorAll('#runs tbody input:checked').length") == 0
    browser.value("document.querySelector('#all').click()")
    browser.value(settled)
    assert browser.value(lines) == before
    assert browser.said == []


def test_tokens_tell_of_themselves_under_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    tip = "getComputedStyle(document.activeElement, '::after').content"
    browser.value("document.querySelector('.token.kept[tabindex]').focus()")
    assert browser.value("document.activeElement.dataset.tip") == browser.value(f"JSON.parse({tip})") == HOSTILE[0]


@pytest.mark.slow
def test_it_fits_a_phone_and_paper(browser: Browser, page: Path) -> None:
    browser.open(page, width=PHONE, height=844, phone=True)
    assert browser.value(WIDTH) == PHONE
    assert browser.value(CHARTS) == browser.value(FIGURES)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) > 3
    assert browser.value("document.querySelectorAll('details:not([open])').length") == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_texts_stand_out(browser: Browser, page: Path, scheme: str) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(page)
    found = browser.value(CONTRAST)
    assert min(found) > 4.5, found


def test_lines_differ_without_their_colours(browser: Browser, page: Path) -> None:
    browser.open(page)
    keys = browser.value(
        "[...document.querySelectorAll('#runs .swatch')].map((s) => s.querySelector('line').getAttribute("
        "'stroke-dasharray') + s.querySelector('path').getAttribute('d'))"
    )
    assert len(keys) == len(HOSTILE) + 1
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
@pytest.mark.parametrize(("num_runs", "steps"), [(40, 300), (1, 100_000)])
def test_many_and_long_runs_are_drawn(browser: Browser, tmp_path: Path, num_runs: int, steps: int) -> None:
    for number in range(num_runs):
        write_run(tmp_path / f"runs/{number}", num_offsets=16 if num_runs > 1 else 4, steps=steps)
    (tmp_path / "page.html").write_text(page_of(read_runs(find_runs([tmp_path / "runs"]))))
    browser.open(tmp_path / "page.html")
    assert browser.said == []
    assert browser.value(CHARTS) == browser.value(FIGURES) > 7
