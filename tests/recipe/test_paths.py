"""`~` and variables are expanded wherever a path may stand; what cannot be looked up is refused by name."""

import json
from pathlib import Path

import pytest

from mtp_lightning.errors import RecipeError
from mtp_lightning.launch.site import load_site
from mtp_lightning.recipe import load_recipe, recipe_to_yaml
from mtp_lightning.recipe.rules.base import value_at
from mtp_lightning.recipe.rules.paths import PATH_RULES
from mtp_lightning.recipe.schema.paths import texts_of
from tests.support.runs import ROOT, mtp

LOCAL = {
    *("run.dir", "run.cache", "init.path", "strategy.nvme_path", "heads.draft_vocabulary"),
    *("data.corpus", "data.tokenizer", "memory.cache_hidden_states"),
}
ANYWHERE = {
    *("data.shards", "data.mixture", "data.max_epochs", "data.stream.train", "data.stream.validation"),
    *("data.mixture_schedule.weights", "logging.tracking_uri"),
}
KEYS = ("data.mixture", "data.max_epochs", "data.mixture_schedule.weights")
FORMS = {"$PLACE/é x": "{place}/é x", "${PLACE}/x": "{place}/x", "~/x": "{home}/x", "~": "{home}", "a$/~x": "a$/~x"}


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NOWHERE", raising=False)
    return {"place": str(tmp_path / "place"), "home": str(tmp_path / "home")}


def fields_of(field, path):
    """Fields of a recipe that hold a path at one place, and what else that place needs."""
    text = f"{path}/tokenizer.json" if field == "data.tokenizer" else path
    if field.startswith("data.stream"):
        other = {"train": [text], "validation": [text]}
        return ["data.kind=webdataset_stream", f"data.stream={json.dumps(other)}"]
    if field in KEYS:
        schedule = f"data.mixture_schedule={json.dumps({'at_rows': [0], 'weights': {text: [1.0]}})}"
        return [*(f"{name}={json.dumps({text: 1.0})}" for name in ("data.mixture", "data.max_epochs")), schedule]
    if field == "memory.cache_hidden_states":
        return ["freeze=[trunk]", f"{field}={json.dumps(text)}"]
    return [f"{field}={json.dumps([text] if field == 'data.corpus' else text)}"]


def load(*overrides):
    Path("r.yaml").write_text("name: a\n", encoding="utf-8")
    return load_recipe("r.yaml", overrides).recipe


def test_all_fields_that_hold_paths_are_known():
    assert {rule.fields[0] for rule in PATH_RULES} == LOCAL | ANYWHERE


@pytest.mark.parametrize("field", sorted(LOCAL | ANYWHERE))
def test_a_path_is_expanded_and_saved_as_it_was_then(field, places, monkeypatch):
    for form, expected in FORMS.items():
        recipe = load(*fields_of(field, form))
        (path,) = texts_of(value_at(recipe, field))
        assert path.removesuffix("/tokenizer.json") == expected.format(**places)
        Path("saved.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
        with monkeypatch.context() as elsewhere:
            elsewhere.delenv("PLACE")
            elsewhere.setenv("HOME", "/elsewhere")
            assert load_recipe("saved.yaml").recipe == recipe


REFUSED = {"$NOWHERE/x": "NOWHERE is not set", "${NOWHERE}": "NOWHERE is not set", "~nobody-here/x": "of nobody-here"}
REFUSED |= {
    "": "empty",
    " ": "empty",
    "a\0b": "NUL",
    "x" * 256: "256 bytes",
    "é/" * 2000: "a system takes",
    "${": "is not set",
}


@pytest.mark.parametrize("field", sorted(LOCAL | ANYWHERE))
def test_a_path_that_leads_nowhere_is_refused_with_its_reason(field):
    refused = REFUSED | ({"s3://bucket/x": "URL", "file:///x": "URL"} if field in LOCAL else {})
    for path, reason in refused.items():
        if field == "data.tokenizer" and reason in ("empty", "not set"):
            continue  # what the tokenizer's ending makes something else of
        if field in KEYS and len(path) > 1024:
            continue  # no key of YAML
        with pytest.raises(RecipeError) as caught:
            load(*fields_of(field, path))
        assert any(fault.path == field and reason in fault.hint for fault in caught.value.faults), path


def test_urls_keep_what_is_no_variable():
    recipe = load("data.shards=s3://bucket/$PLACE/x", "logging.tracking_uri=sqlite:///$PLACE/x.db")
    assert recipe.data.shards.endswith("/place/x")
    assert recipe.logging.tracking_uri.endswith("/place/x.db")


def test_two_sources_that_are_one_are_refused():
    with pytest.raises(RecipeError) as caught:
        load("data.mixture={$PLACE/a: 1, '${PLACE}/a': 3}")
    assert "PLACE cannot be expanded here" in caught.value.faults[0].hint


def test_paths_in_phases_are_expanded_too(places):
    recipe = load("phases={a: {data: {shards: $PLACE/x}}, b: {data: {corpus: [~/y]}}}")
    assert recipe.phases["a"].data == {"shards": f"{places['place']}/x"}
    assert recipe.phases["b"].data == {"corpus": [f"{places['home']}/y"]}


def test_a_site_and_the_options_of_verbs_are_expanded(tmp_path, places):
    site = {"scratch": "$PLACE/s", "activate": "~/a", "mtp": ["~/mtp"], "node_local": ["$PLACE"]}
    site["container"] = {"image": "docker://x/$PLACE", "mounts": ["$PLACE:/data"]}
    Path("home").mkdir()
    Path("home/s.yaml").write_text(json.dumps(site), encoding="utf-8")
    read = load_site("~/s.yaml")
    place, home = places["place"], places["home"]
    assert (read.scratch, read.activate, read.mtp) == (f"{place}/s", f"{home}/a", [f"{home}/mtp"])
    assert read.container.mounts == [f"{place}:/data"]
    Path(place).mkdir()
    done = mtp("plan", str(ROOT / "recipes/debug/parallel.yaml"), "--json=$PLACE/plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path(place, "plan.json").read_text())
    refused = mtp("plan", str(ROOT / "recipes/debug/parallel.yaml"), "--json=$NOWHERE/plan.json", cwd=tmp_path)
    assert (refused.returncode, "NOWHERE is not set" in refused.stderr) == (4, True)


@pytest.mark.parametrize("name", ["a$PLACE", "b$NOWHERE", "c${NOWHERE"])
def test_what_is_there_by_this_very_name_is_not_expanded(name):
    folder = Path(name)
    folder.mkdir()
    recipe = load(f"data.corpus=['{name}']", f"run.dir='{name}'", f"data.tokenizer='{name}'")
    assert [recipe.data.corpus, recipe.run.dir, recipe.data.tokenizer] == [[name], name, name]
    (folder / "parent.yaml").write_text("name: parent\n", encoding="utf-8")
    (folder / "r.yaml").write_text("extends: parent.yaml\n", encoding="utf-8")
    assert load_recipe(folder / "r.yaml").recipe.name == "parent"


def test_a_recipe_of_another_encoding_and_a_circle_of_links_are_told_apart():
    Path("r.yaml").write_text("name: é\n", encoding="utf-16")
    Path("l.yaml").symlink_to("l.yaml")
    for file, found, hint in (
        ("r.yaml", "not UTF-8", "Save it as UTF-8"),
        ("l.yaml", "symbolic links", "Give the path"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(file)
        (fault,) = caught.value.faults
        assert found in fault.found
        assert hint in fault.hint
