"""Links, commands, fields and Python code of the documents are those of the program."""

import re

import pytest
import typer

from mtp_lightning.cli.app import app
from mtp_lightning.recipe import Recipe, load_recipe
from mtp_lightning.recipe.loading.load import is_recipe_path
from mtp_lightning.recipe.schema.field_types import place_at
from tests.docs.documents import (
    PAGES,
    ROOT,
    WRITTEN,
    anchors,
    blocks,
    commands,
    commands_of,
    expanded,
    inline_code,
    links,
    name_of,
)
from tests.support import warm

TEXTS = {name_of(page): page.read_text(encoding="utf-8") for page in PAGES}
BY_HAND = [name_of(page) for page in PAGES if WRITTEN not in page.parents]
COMMAND = typer.main.get_command(app)
FIELD = re.compile(rf"({'|'.join(Recipe.model_fields)})\.[a-z_][\w.]*")
PATH = re.compile(r"(recipes|mtp_lightning|tests|docs|cluster)/[\w./-]+\.\w+")


def context_of(arguments):
    """Follow the verbs of a command line; return the last command, its name, and the arguments that are left."""
    command, left, names = COMMAND, list(arguments), []
    while hasattr(command, "commands") and left and not left[0].startswith("-"):
        unnamed = getattr(command, "unnamed", None)  # a verb that need not be named
        names.append(unnamed if unnamed and left[0] not in command.commands else left.pop(0))
        assert names[-1] in command.commands, f"no command mtp {' '.join(names)}"
        command = command.commands[names[-1]]
    return command, " ".join(names), left


def unknown_options(command, left):
    """List options that a command does not have."""
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    return [word for word in left if word.startswith("--") and word.partition("=")[0] not in options]


def overrides_of(left):
    """Recipe file and overrides of a command that takes them; those of a site are not the recipe's."""
    words = [word for word in left if not word.startswith(("-", "site."))]
    return words[0], [word for word in words[1:] if "=" in word or is_recipe_path(word)]


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in links(TEXTS[page]):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", BY_HAND)
def test_commands_parse(page):
    for arguments in commands(TEXTS[page]):
        command, name, left = context_of(arguments)
        if any(word.startswith("$") for word in left):  # what a shell puts there may be anything
            assert unknown_options(command, left) == [], f"mtp {name}"
            continue
        try:
            command.make_context(name, left)
        except Exception as error:  # typer's classes change their place with its version
            if type(error).__name__ != "Exit":  # that of --help
                pytest.fail(f"mtp {' '.join(arguments)}: {error}")


@pytest.mark.parametrize("page", BY_HAND)
def test_commands_in_sentences_have_verbs_and_options_that_there_are(page):
    for text in inline_code(TEXTS[page]):
        if not re.match(r"(\S*/)?mtp( |$)", text):
            continue
        for arguments in commands_of(text.replace("…", "").replace("'", "")):
            command, name, left = context_of(arguments)
            assert unknown_options(command, left) == [], f"mtp {name}"


@pytest.mark.parametrize("page", BY_HAND)
def test_recipes_of_commands_are_valid(page):
    for arguments in commands(TEXTS[page]):
        command, _, left = context_of(arguments)
        takes_recipe = any(parameter.name == "recipe" for parameter in command.params)
        if takes_recipe and left and left[0].startswith("recipes/"):
            load_recipe(ROOT / left[0], [_from_root(word) for word in overrides_of(left)[1]])
        for word in left:
            if word.startswith("recipes/"):
                assert (ROOT / word).exists(), word


def _from_root(word):
    return str(ROOT / word) if is_recipe_path(word) else word


@pytest.mark.parametrize("page", BY_HAND)
def test_fields_and_files_that_are_named_exist(page):
    for text in inline_code(TEXTS[page]):
        for word in re.split(r"[ ,|]+", text):
            if FIELD.fullmatch(word.partition("=")[0].rstrip(":")) and not word.endswith(".safetensors"):
                assert place_at(word.partition("=")[0].rstrip(":").split(".")), word
            if PATH.fullmatch(word) and "NAME" not in word:
                assert [path for path in expanded(word) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", BY_HAND)
def test_no_page_speaks_of_the_machine_it_was_written_on(page):
    assert not re.search(r"(?<![\w.])/(root|home|Users)/", TEXTS[page])


@pytest.mark.parametrize("page", [page for page in BY_HAND if blocks(TEXTS[page], "python")])
def test_python_code_runs(page, tmp_path):
    """The blocks of a page are one program, run beside the recipes."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = warm.run(cwd=tmp_path, code="\n\n".join(blocks(TEXTS[page], "python")))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [page for page in BY_HAND if blocks(TEXTS[page], "yaml")])
def test_recipes_in_the_text_are_valid(page, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for number, text in enumerate(blocks(TEXTS[page], "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        load_recipe(path)


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 110
