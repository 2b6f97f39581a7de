"""Imports go downwards only; heavy libraries enter at one place."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.structure.source import FILES, PACKAGE, imports_of, module_of, tree_of

LAYERS = (
    ("errors",),
    ("files",),
    ("recipe",),
    ("planner",),
    ("launch",),
    ("ranks", "console"),
    ("data", "losses"),
    ("model",),
    ("checkpoint", "decode"),
    ("training",),
    ("diagnostics",),
    ("evaluation", "api"),
    ("bench",),
    ("cli",),
)
"""From the bottom up; rooms of one layer do not know each other."""

ABOVE = ("__init__", "__main__")
"""Files that are no rooms: what the package shows, and the command."""

ON_REQUEST = {("mtp_lightning.planner.counts", "mtp_lightning.model.foreign_counts")}
"""The one way upwards: a model of transformers' classes is counted by building it without memory. The import stands
inside of functions, so that all other plans need no torch."""

STRANGERS = {("model", "data")}
"""Not below one another in the plan of the house, though a layer lies between."""


def room_of(path: Path) -> str:
    """Return the room of the house that a file lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def below(room: str) -> set[str]:
    """Return the rooms that a room may import."""
    level = next(level for level, rooms in enumerate(LAYERS) if room in rooms)
    lower = {other for rooms in LAYERS[:level] for other in rooms}
    return {room} | {other for other in lower if (room, other) not in STRANGERS}


def imports_in_plan(path: Path) -> list[tuple[int, str]]:
    """List what a file imports, with the lines, but for what is allowed on request."""
    own = module_of(path)
    return [(line, name) for line, name in imports_of(path) if (own, name.rpartition(".")[0]) not in ON_REQUEST]


def rooms_imported(path: Path) -> list[tuple[int, str]]:
    """List the rooms that a file imports, with the lines."""
    names = [(line, name.split(".")) for line, name in imports_in_plan(path)]
    return [(line, parts[1]) for line, parts in names if parts[0] == PACKAGE.name and len(parts) > 1]


def test_every_file_lies_in_a_room_of_the_plan_and_every_room_has_files() -> None:
    rooms = {room for layer in LAYERS for room in layer} | set(ABOVE)
    assert {room_of(path) for path in FILES} == rooms


def test_imports_go_downwards() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)}, line {line}: {other}"
        for path in FILES
        if room_of(path) not in ABOVE
        for line, other in rooms_imported(path)
        if other not in below(room_of(path)) | {"__version__"}
    ]
    assert upwards == []


@pytest.mark.parametrize(("user", "target"), ON_REQUEST)
def test_what_is_imported_on_request_is_so_only_inside_of_functions(user: str, target: str) -> None:
    path = PACKAGE.parent.joinpath(*user.split(".")).with_suffix(".py")
    at_once = [node.module for node in tree_of(path).body if isinstance(node, ast.ImportFrom)]
    assert target not in at_once
    assert target in {name.rpartition(".")[0] for _, name in imports_of(path)}


def test_no_import_hides_from_these_tests() -> None:
    """A module of this package is named in a string by the package's own front door alone."""
    hidden = [
        f"{path.relative_to(PACKAGE)}, line {node.lineno}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
        and any(PACKAGE.name in ast.dump(argument) for argument in node.args)
    ]
    assert {entry.partition(",")[0] for entry in hidden} == {"__init__.py"}


def test_the_plan_of_the_house_is_read_right() -> None:
    paper = {"errors", "files", "recipe", "planner", "launch", "ranks", "console"}
    assert below("recipe") == {"recipe", "errors", "files"}
    assert below("data") == paper | {"data"}
    assert below("model") == paper | {"model", "losses"}
    assert below("training") >= {"checkpoint", "data", "model", "losses"}


def test_the_package_itself_imports_none_of_its_rooms() -> None:
    """Types are told to a type checker; at run time a name is imported when it is first asked for."""
    statements = [node for node in tree_of(PACKAGE / "__init__.py").body if not isinstance(node, ast.If)]
    imported = [node.module for node in statements if isinstance(node, ast.ImportFrom)]
    assert imported == ["importlib", "typing"]
    assert not [node for node in statements if isinstance(node, ast.Import)]


@pytest.mark.parametrize(("library", "most_files"), [("deepspeed", 1), ("transformers", 1)])
def test_library_is_imported_in_one_file(library: str, most_files: int) -> None:
    """Beside it in what is copied into exported folders, which nothing here imports."""
    files = {path for path in FILES for _, name in imports_of(path) if name.split(".")[0] == library}
    assert len([path for path in files if path.parent.name != "folder_code"]) <= most_files
    modules = {name for path in FILES for _, name in imports_of(path)}
    assert not [name for name in modules if "folder_code.with_" in name]


def test_webdataset_is_imported_in_one_package() -> None:
    rooms = {room_of(path) for path in FILES for _, name in imports_of(path) if name.split(".")[0] == "webdataset"}
    assert rooms == {"data"}


def test_imports_are_found_at_all() -> None:
    assert ("data", "recipe") in {(room_of(path), other) for path in FILES for _, other in rooms_imported(path)}
    assert len(FILES) > 50


def parts_of(module: str, depth: int) -> str:
    """Return the room at a depth that a module lies in: `training.step` of `mtp_lightning.training.step.batch`."""
    return ".".join(module.split(".")[1 : depth + 1])


@pytest.mark.parametrize("depth", [1, 2, 3], ids=["packages", "rooms", "files"])
def test_no_imports_run_in_a_circle(depth: int) -> None:
    """Neither between packages, nor between the rooms of one, nor between files."""
    modules = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    users: dict[str, set[str]] = {}
    for module, path in modules.items():
        own = parts_of(module, depth)
        for _, name in imports_in_plan(path):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and parts_of(target, depth) != own:
                users.setdefault(own, set()).add(parts_of(target, depth))
    assert len(users) > 10
    TopologicalSorter(users).prepare()  # raises CycleError, which names the circle
