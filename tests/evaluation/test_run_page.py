"""The page of runs: every figure that is drawn is one of metrics.csv, and no text of a run becomes markup."""

import json
import math
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.errors import visible
from mtp_lightning.evaluation.run_page.curves import read_curves, thin
from mtp_lightning.evaluation.run_page.runs import find_runs, read_runs
from mtp_lightning.evaluation.run_page.write import page_of
from mtp_lightning.training.logging.metrics_files import read_rows
from tests.support import warm
from tests.support.run_folders import usual, write_run

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' x=\"",
    "<!--<script>",
    "]]><svg onload=alert(1)>",
    "</title></style></textarea><h1>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp;amp; &#60;",
    "\u2028\u2029\u202etxt.exe\ufeff",
    "javascript:alert(1)",
    "`${alert(1)}`\\u003cb\\x3c",
    "Änderung 模型 🎉",
]
"""What a name may hold: ends of elements and attributes, templates, references, separators of lines, other scripts."""


class Page(HTMLParser):
    """What a browser makes of a page, as far as a parser of the standard library knows."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.data: dict = {}
        self._in = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._in = "data" if ("id", "data") in attrs else tag
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self._in == "data":
            self.data = json.loads(data)
        elif self._in not in ("script", "style"):
            self.texts.append(data)
        self._in = "" if self._in in ("data", "script", "style") else self._in

    def text(self):
        return "".join(self.texts)


def page_of_folders(*folders: Path) -> Page:
    return Page(page_of(read_runs(find_runs([*folders]))))


def invoke(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    write_run(made / "a", name="a", sources=("web", "code, C++"), attempts=3)
    write_run(made / "b", name="b", num_offsets=2, overrides=("optimizer.lr=0.5",))
    return made


def test_a_short_run_is_drawn_figure_by_figure(folder: Path) -> None:
    page = page_of_folders(folder / "a")
    rows = read_rows(folder / "a/metrics.csv")
    curves = page.data["runs"][0]["curves"]
    for name in ("train/loss_1", "val/loss_4", "val/acceptance_rate_3", "drift/nll_change_low", "lr"):
        expected = [(row["step"], float(f"{row[name]:.5g}")) for row in rows if name in row]
        assert expected
        assert [*zip(*curves[name], strict=True)] == expected
    assert "val/mean_acceptance_length@code, C++" in curves
    assert not [name for name in curves if "label_accuracy" in name]  # what is not drawn costs nothing


def test_charts_are_by_offset_for_one_run_and_by_run_for_several(folder: Path) -> None:
    alone, both = page_of_folders(folder / "a"), page_of_folders(folder)
    lines = {panel["title"]: [line["name"] for line in panel["lines"]] for panel in alone.data["panels"]}
    assert lines["Loss"] == ["offset 1", "offset 2", "offset 3", "offset 4"]
    runs = {panel["title"]: [line["run"] for line in panel["lines"]] for panel in both.data["panels"]}
    assert runs["Loss, offset 1"] == runs["Accepted, offset 2"] == [0, 1]
    assert runs["Loss, offset 3"] == runs["Acceptance length by source, code, C++"] == [0]
    assert alone.tags.count("figure") == len(lines)
    assert both.tags.count("figure") == len(runs)


def test_tables_say_what_differs_and_when_runs_were_started(folder: Path) -> None:
    text = page_of_folders(folder).text()
    assert "optimizer.lr" in text
    assert "≠ 0.5" in text
    assert "≠ 2" in text
    assert "2026-01-03T00:00:00+00:00" in text


@pytest.mark.parametrize("seed", range(20))
def test_thinning_keeps_ends_and_extremes(seed: int) -> None:
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(10_000), rng.choice((3, 50, 2000))))
    points = [(step, rng.choice((rng.gauss(0, 1), 50 * rng.random()))) for step in steps]
    kept = thin(points, most := rng.choice((2, 10, 100)))
    assert kept == sorted(set(kept) & set(points))
    assert len(kept) <= max(most, 2) + 4
    assert {points[0], points[-1]} <= set(kept)
    assert {max(points, key=lambda p: p[1])[1], min(points, key=lambda p: p[1])[1]} <= {value for _, value in kept}


def test_figures_that_are_not_finite_are_told_and_marked(tmp_path: Path) -> None:
    odd = {30: math.nan, 31: math.inf, 60: -math.inf, 61: 1e308}
    run = write_run(tmp_path / "a", figure=lambda name, step: odd.get(step) if "loss_1" in name else usual(name, step))
    page = page_of_folders(run)
    assert page.data["runs"][0]["holes"]["train/loss_1"] == [30, 31, 60, 61]
    assert "train/loss_1 is not a number that can be drawn in 4 rows, the first at step 30." in page.text()


FILES = {
    "torn": lambda text: text[: len(text) - 40],
    "header alone": lambda text: text.splitlines(keepends=True)[0],
    "empty": lambda text: "",
    "half a header": lambda text: text[:50],
    "no step": lambda text: text.replace("step", "stop", 1),
    "zeros": lambda text: "\0" * 300 + "\n",
    "other cells": lambda text: text + "x,y\n" + "," * text.partition("\n")[0].count(",") + "\n",
    "endless steps": lambda text: text + "1e400" + "," * text.partition("\n")[0].count(",") + "\n",
    "long field": lambda text: text + "9" * 200_000 + "\n",
}


@pytest.mark.parametrize("kind", FILES)
def test_metrics_that_a_kill_or_a_hand_has_spoilt(kind: str, tmp_path: Path) -> None:
    path = write_run(tmp_path / "a") / "metrics.csv"
    path.write_text(FILES[kind](path.read_text()))
    page = page_of_folders(tmp_path / "a")
    steps = page.data["runs"][0]["curves"].get("train/loss_1", [[]])[0]
    assert len(steps) == {"torn": 99, "other cells": 100, "endless steps": 100, "long field": 100}.get(kind, 0)
    assert ("no figures yet" in page.text()) == (not steps)


@pytest.mark.parametrize("missing", ["metrics.csv", "recipe.yaml", "logs/attempt_1/environment.json"])
def test_a_run_that_has_just_begun(missing: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / missing).unlink()
    assert page_of_folders(run).tags.count("table") >= 2


def test_one_offset_and_no_validation(tmp_path: Path) -> None:
    never = write_run(
        tmp_path / "a", num_offsets=1, figure=lambda n, s: None if "val/" in n or "acc" in n else usual(n, s)
    )
    page = page_of_folders(never)
    assert "Nothing is drafted" in page.text()
    assert page.data["panels"][0]["title"] == "Loss"


def test_phases_are_counted_through(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=1)
    write_run(run / "phases/1-warm", steps=30)
    write_run(run / "phases/2-full", steps=20)
    write_run(run / "phases/10-late", steps=10)
    curves = page_of_folders(run).data["runs"][0]
    assert curves["curves"]["lr"][0] == [*range(1, 61)]
    assert curves["phase_ends"] == [30, 50]


ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "id", "class", "type", "checked"),
    *("data-panel", "data-run", "data-tip", "tabindex", "role", "aria-label", "dir"),
}
"""All that elements of a page have; none runs anything or leads anywhere."""


def write_hostile(folder: Path, text: str) -> None:
    """Put a text wherever a run may hold one: name, tag, field, source, folder, results, machine, decoder, bad file."""
    name = "".join(one for one in text if one.isprintable()).replace("/", "_")[:60]
    run = write_run(folder / name, sources=(text,), steps=40)
    recipe = {"name": text, "logging": {"tags": [text]}, text: 1}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=False))
    (run / "logs/attempt_1/environment.json").write_text(json.dumps({"host": text, "packages": {"torch": text}}))
    (run / "eval.json").write_text(json.dumps({text: text, "list": [{text: [text]}]}))
    (run / f"{name}.json").write_text("{")
    rows = [{"decoder": text, "batch": {text: 1}}]
    (run / "decode.json").write_text(json.dumps({"benchmark": "decode", "figures": rows}))


def drafts_with(text: str) -> list[dict]:
    tokens = [{"text": text, "role": role, "tip": text} for role in ("own", "kept", "rejected")]
    return [
        {"run": 1, "name": text, "given": text, "summary": text, "tokens": tokens},
        {"run": 2, "name": text, "missing": text},
    ]


def comparison_with(text: str) -> dict:
    return {"tables": [(["recipe", text], [[text, "1"]])], "notes": [text]}


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_runs_stay_texts(text: str, tmp_path: Path) -> None:
    write_hostile(tmp_path / "x", text)
    write_hostile(tmp_path / "plain", "plain")
    parts = {t: {"drafts": drafts_with(t), "comparison": comparison_with(t)} for t in (text, "plain")}
    page = Page(page_of(read_runs(find_runs([tmp_path / "x"])), **parts[text]))
    plain = Page(page_of(read_runs(find_runs([tmp_path / "plain"])), **parts["plain"]))
    shown = visible(text)
    assert page.tags == plain.tags
    assert page.text().count(shown) >= 20
    assert {name for name, _ in page.attributes} == ATTRIBUTES
    assert ("data-tip", shown) in page.attributes
    assert page.data["runs"][0]["name"] == visible(text, kept="")


def test_the_page_names_nothing_of_the_network(folder: Path) -> None:
    page = page_of_folders(folder)
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action", "data", "poster"}
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_the_verb_needs_no_name(folder: Path, tmp_path: Path) -> None:
    for number, words in enumerate((["page", folder], [folder], [folder / "a", folder / "b"])):
        code, said = invoke("report", *words, "--html", page := tmp_path / f"new/{number}.html")
        assert (code, said) == (0, f"written: {page}, 2 runs\n")
    assert invoke("report", "--html", tmp_path / "x.html", folder)[0] == 0
    assert invoke("status", folder, "--html", tmp_path / "status.html")[0] == 0
    pages = [Page((tmp_path / name).read_text()) for name in ("x.html", "status.html", "new/0.html")]
    assert pages[0].data == pages[1].data == pages[2].data
    assert "Compare recipes" in invoke("report", "compare", "--help")[1]


def test_a_comparison_over_seeds_is_on_the_page_too(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path / f"seed{seed}", name="both", steps=40, overrides=(f"run.seed={seed}",))
        (run / "summary.json").write_text(json.dumps({"recipe": "both", "seed": seed, "num_offsets": 4}))
    runs = [tmp_path / "seed0", tmp_path / "seed1"]
    code, said = invoke("report", "compare", *runs, "--html", tmp_path / "page.html")
    assert code == 0
    text = Page((tmp_path / "page.html").read_text()).text()
    figures = next(line for line in said.splitlines() if line.startswith("both")).split()
    assert len(figures) > 8
    assert all(figure in text for figure in figures)
    assert "half a 95 % interval over seeds" in text
    assert "Loss, offset 4" in text


REFUSALS = {
    "no folder": (["nowhere"], "no folder nowhere"),
    "no run": (["EMPTY"], "none in EMPTY"),
    "a run beside none": (["RUN", "EMPTY"], "none in EMPTY"),
    "a mistyped verb": (["compar", "RUN"], "no folder compar"),
    "a file of the run": (["RUN", "--html", "RUN/metrics.csv"], "must end in .html, .htm"),
    "a folder": (["RUN", "--html", "EMPTY"], "EMPTY, a folder"),
    "an empty sample": (["RUN", "--sample-text", "EMPTY/none.txt"], "which is empty"),
    "a sample that is none": (["RUN", "--sample-text", "nowhere.txt"], "nowhere.txt: no such file"),
    "both": (["RUN", "--prompt", "a", "--sample-text", "EMPTY/none.txt"], "give either"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused(case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY/none.txt").touch()
    words, found = REFUSALS[case]
    code, said = invoke("report", *(word.replace("RUN", str(folder / "a")) for word in words))
    assert code != 0
    assert found in said.replace("\n", " ").replace("│", "")
    assert not (tmp_path / "report.html").exists()


def test_a_disk_without_room_leaves_the_old_page(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n{warm.MTP}"
    done = warm.run("report", str(folder), cwd=tmp_path, code=code)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
    assert "the file for the page must be writable" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_link_stays_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "target.html")
    assert invoke("report", folder, "--html", tmp_path / "link.html")[0] == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "target.html").read_text().startswith("<!DOCTYPE html>")


def test_what_evaluations_leave_in_run_folders_is_put_side_by_side(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "runs")
    for name, share in (("a", 0.25), ("b", 0.75)):
        figures = {"task": "x", "pass": {"1": share}, "rows": [{"k": 1, "v": [1, 2]}], "none": None}
        (tmp_path / f"runs/{name}/eval").mkdir()
        (tmp_path / f"runs/{name}/eval/code.json").write_text(json.dumps(figures))
    first, second = read_runs(find_runs([tmp_path / "runs"]))
    assert first.results == {
        "eval/code.json": {"task": "x", "pass.1": "0.25", "rows[1].k": "1", "rows[1].v": "[1, 2]", "none": "null"}
    }
    assert second.results["eval/code.json"]["pass.1"] == "0.75"
    many = {str(k): k for k in range(1000)}
    (tmp_path / "runs/a/many.json").write_text(json.dumps(many))
    (first, _) = read_runs(find_runs([tmp_path / "runs"]))
    assert len(first.results["many.json"]) == 201
    assert first.results["many.json"]["…"] == "the rest is left out, 800 or more values"


@pytest.mark.slow
def test_long_runs_and_many_runs_fit_a_page(tmp_path: Path) -> None:
    def spiky(name: str, step: int) -> float | None:
        return 77.0 if step == 54_321 and name == "train/loss_2" else usual(name, step)

    write_run(tmp_path / "long", steps=100_000, figure=spiky)
    content = page_of(read_runs(find_runs([tmp_path / "long"])))
    assert len(content) < 1_500_000
    steps, values = Page(content).data["runs"][0]["curves"]["train/loss_2"]
    assert (steps[0], steps[-1]) == (1, 100_000)
    assert steps[values.index(77.0)] == 54_321
    for number in range(40):
        write_run(tmp_path / f"many/{number}", num_offsets=16, steps=300, overrides=(f"run.seed={number}",))
    assert len(page_of(read_runs(find_runs([tmp_path / "many"])))) < 5_000_000


def test_reading_again_and_again_thins_no_extreme_away(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=3000, figure=lambda name, step: -1.0 if step == 777 else usual(name, step))
    curves = read_curves([run], 20)
    assert len(curves.points["train/loss_1"]) <= 24
    assert (777, -1.0) in curves.points["train/loss_1"]
    assert curves.num_rows == 3000
