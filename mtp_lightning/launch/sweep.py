"""Sweeps: recipes, values of some fields and seeds, a run folder for each combination; planned and checked whole."""

import graphlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mtp_lightning.errors import Fault, LaunchError, RecipeError, RunFolderError
from mtp_lightning.files.lock import wait_for_lock
from mtp_lightning.files.paths import expanded, leads_to
from mtp_lightning.launch.run_marker import check_may_be_run, claim, is_run, read_marker
from mtp_lightning.recipe import Recipe, diff_recipes, load_recipe, recipe_to_yaml
from mtp_lightning.recipe.yaml import one_line_yaml

MOST_RUNS = 1000
LONGEST_NAME_BYTES = 200  # most file systems take 255
RECIPE = "recipe.yaml"
SEED = "{seed}"  # in init.path: the member's own
OWN_FIELDS = {"run.dir": "Give --out.", "run.seed": "Give --seeds.", "run.restart": "Give another --out."}


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str  # of its folder beneath the sweep's
    recipe: Recipe
    starts_from: str | None = None  # the member whose weights it starts from

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run.dir)


def plan_sweep(
    arguments: Sequence[str],
    *,
    seeds: str,
    vary: Sequence[str],
    out: Path,
    base: Path | None = None,
    is_later: bool = False,
) -> list[Member]:
    """Resolve every recipe with every combination of values and every seed, in the order in which they can be trained.

    All recipes with the first seed come first; a run that starts from another one's folder comes after it.

    Args:
        arguments: paths of recipes or of folders with recipes, and `key=value` for all of them.
        seeds: as in 0,1,2; a number alone is how many, from 0.
        vary: as in optimizer.lr=1e-4,3e-4.
        out: folder of the sweep.
        base: folder of a model with a recipe: every recipe is laid over that, and starts from this model.
        is_later: what they start from need not be there yet.

    Raises:
        LaunchError: A list of values cannot be read, or there are too many runs.
        RecipeError: Names all faults of all members.
    """
    paths = [path for argument in arguments if "=" not in argument for path in _recipes_in(argument)]
    given = [argument for argument in arguments if "=" in argument]
    points = sweep_points([f"run.seed={','.join(seeds_of(seeds))}", *vary])
    keys = {override.partition("=")[0].strip(): override for override in (*given, *vary)}
    own = [_fault(key, "must be left to the sweep", keys[key], OWN_FIELDS[key]) for key in OWN_FIELDS if key in keys]
    faults = own if paths else [*own, _fault("RECIPE", "must be given at least once", "none", "Give one or more.")]
    members: dict[str, Member] = {}
    for (seed, *point), path in itertools.product(points, paths):
        try:
            member = _member(path, base, [*given, *point, seed], folder_name(point), out)
        except RecipeError as error:
            faults += [fault for fault in error.faults if fault not in faults]
            continue
        if members.setdefault(member.name, member) is not member:
            hint = (
                "Give each recipe a name of its own (name: …), and each recipe once; values that --vary gives must "
                "differ in letters, digits or . = + -, which are what names of folders keep of them."
            )
            faults.append(_fault("name", "must differ between the runs of a sweep", f"{member.name} twice", hint))
    ordered = _ordered(list(members.values()), faults)
    for member in ordered:
        start = member.recipe.init.path
        if start and not (is_later or member.starts_from or Path(start).exists()):
            hint = f"Correct it; {SEED} in it stands for a run's seed."
            found = f"{start}, of {member.name}"
            faults.append(_fault("init.path", "must be there, or be a run of this sweep", found, hint))
    if faults:
        raise RecipeError(faults)
    return ordered


def seeds_of(text: str) -> list[str]:
    """Read `--seeds`: a number alone is how many, from 0; a list is the seeds themselves.

    >>> seeds_of("3"), seeds_of("5,7"), seeds_of("7,")
    (['0', '1', '2'], ['5', '7'], ['7'])

    Raises:
        LaunchError: There is none, one is no number or comes twice, or there are too many.
    """
    expected = f"--seeds must be how many, 1 to {MOST_RUNS:,}, or the seeds themselves, each once"
    hint = "Write --seeds 3 for the seeds 0, 1 and 2, --seeds 5,7 for these, or --seeds '7,' for one alone"
    if text.strip().isdecimal():
        count = int(text)
        if not 1 <= count <= MOST_RUNS:
            raise LaunchError(expected, repr(text), hint)
        return [str(seed) for seed in range(count)]
    seeds = [seed.strip() for seed in text.removesuffix(",").split(",")]
    if not all(seed.isdecimal() for seed in seeds) or len({int(seed) for seed in seeds}) < len(seeds):
        raise LaunchError(expected, repr(text), hint)
    return seeds


def default_folder(arguments: Sequence[str]) -> Path:
    """Name a sweep's folder by what it trains: runs/sweeps and the one recipe's or folder's name.

    >>> default_folder(["recipes/probes/induction", "run.steps=10"]).as_posix()
    'runs/sweeps/induction'

    Raises:
        LaunchError: There is more than one recipe or folder, or none that has a name.
    """
    paths = [argument for argument in arguments if "=" not in argument]
    name = Path(expanded(paths[0])).absolute().name.removesuffix(".yaml") if len(paths) == 1 else ""
    if not name:
        expected = "--out must name the folder of a sweep of several recipes or folders"
        raise LaunchError(expected, f"{len(paths)} of them and no --out", "Give --out FOLDER")
    return Path("runs/sweeps") / name


def sweep_points(sweeps: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a sweep, in order; without sweeps one run without any.

    >>> sweep_points(["optimizer.lr=1e-4,3e-4", "optimizer.betas=[0.9,0.95]"])
    [['optimizer.lr=1e-4', 'optimizer.betas=[0.9,0.95]'], ['optimizer.lr=3e-4', 'optimizer.betas=[0.9,0.95]']]

    Raises:
        LaunchError: A sweep is not KEY=V1,V2, repeats a value, or there are too many runs.
    """
    choices = [_choices(sweep) for sweep in sweeps]
    points = [list(point) for point in itertools.product(*choices)]
    if len(points) > MOST_RUNS:
        raise LaunchError(f"a sweep has at most {MOST_RUNS:,} runs", f"{len(points):,}", "Sweep fewer values at once")
    return points


def folder_name(point: Sequence[str]) -> str:
    """Return a name for a run's folder.

    >>> folder_name(["optimizer.lr=1e-4", "data.corpus=[a/b, c]"])
    'optimizer.lr=1e-4,data.corpus=_a_b__c_'
    """
    return ",".join(re.sub(r"[^\w.=+-]", "_", override) for override in point)


def begin_sweep(out: Path, members: Sequence[Member]) -> None:
    """Make the members' run folders, each with its recipe; those of earlier calls stay.

    Raises:
        RunFolderError: The folder is somebody else's, or holds a member with another recipe.
    """
    if not out.is_dir():
        check_may_be_run(out, "--out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone_in(out):  # another sweep that begins here has made none of its runs, or all
            for member in _new_in(out, members):
                claim(member.folder)
                staged = member.folder / f".{RECIPE}"
                staged.write_text(recipe_to_yaml(member.recipe), encoding="utf-8")
                staged.replace(member.folder / RECIPE)
    except OSError as error:
        expected = "--out must be a folder that can be written to"
        raise RunFolderError(expected, f"{error.filename}: {error.strerror}", "Give another") from None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time into the body."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _new_in(out: Path, members: Sequence[Member]) -> list[Member]:
    """List the members that no earlier call has made.

    Raises:
        RunFolderError: As `begin_sweep`.
    """
    if not members_of(out):
        check_may_be_run(out, "--out")
    new = [member for member in members if not (member.folder / RECIPE).is_file()]
    changes = [
        f"{member.name}: {diff.path}: {one_line_yaml(diff.a)} -> {one_line_yaml(diff.b)}"
        for member in members
        if member not in new
        for diff in diff_recipes(load_recipe(member.folder / RECIPE).recipe, member.recipe)
        if diff.path != "run.dir"
    ]
    if changes:
        raise RunFolderError(
            f"a sweep must go on with the recipes that {out} began with",
            f"{len(changes)} changed field{'s' if len(changes) > 1 else ''}:\n  " + "\n  ".join(changes) + "\n",
            "Take the changes back, or give another --out; recipes, values and seeds may be added.",
        )
    return new


def members_of(folder: Path) -> list[Path]:
    """List the run folders of a sweep, in the order in which they were made; none where there is no sweep."""
    runs = [run for run in folder.glob("*/seed*") if is_run(run)]
    return sorted(runs, key=lambda run: str(read_marker(run).get("made_at")))


def _recipes_in(argument: str) -> list[str]:
    """List the recipes of a folder, those beneath it apart; anything else is a recipe itself."""
    folder = Path(expanded(argument))
    is_plain = leads_to(folder, Path.is_dir) and not leads_to(folder / RECIPE)
    own = sorted(folder.glob("*.yaml")) if is_plain else []
    return [str(path) for path in own] or [argument]


def _member(path: str, base: Path | None, overrides: Sequence[str], varied: str, out: Path) -> Member:
    laid = [] if base is None else [path, f"init.path={one_line_yaml(str(base))}"]
    first = path if base is None else base / RECIPE
    own = (*overrides, f"run.dir={one_line_yaml(str(out))}", "run.restart=false")
    recipe = load_recipe(first, [*laid, *own]).recipe
    title = f"{recipe.name}-{varied}" if varied else recipe.name
    name = f"{_as_folder(title)}/seed{recipe.run.seed}"
    start = recipe.init.path and recipe.init.path.replace(SEED, str(recipe.run.seed))
    run = recipe.run.model_copy(update={"dir": str(out.absolute() / name)})
    init = recipe.init.model_copy(update={"path": start})
    return Member(name, recipe.model_copy(update={"name": title, "run": run, "init": init}))


def _as_folder(title: str) -> str:
    """Return a folder's name for a title; one longer than file systems take is cut, and told apart by a digest."""
    name = re.sub(r"^\.|[^\w.=,+-]", "_", title)
    if len(name.encode()) <= LONGEST_NAME_BYTES:
        return name
    return f"{name.encode()[:150].decode(errors='ignore')}-{hashlib.sha256(title.encode()).hexdigest()[:16]}"


def _ordered(members: Sequence[Member], faults: list[Fault]) -> list[Member]:
    """Put members after those whose weights they start from."""
    by_folder = {member.folder.resolve(): member.name for member in members}
    linked: dict[str, Member] = {}
    for member in members:
        start = Path(member.recipe.init.path or "/").resolve()
        former = next((by_folder[path] for path in (start, *start.parents) if path in by_folder), None)
        linked[member.name] = replace(member, starts_from=former)
    needed = {name: [member.starts_from] if member.starts_from else [] for name, member in linked.items()}
    try:
        return [linked[name] for name in graphlib.TopologicalSorter(needed).static_order()]
    except graphlib.CycleError as error:
        found, hint = " from ".join(error.args[1]), "Start one of them from another model."
        faults.append(_fault("init.path", "must not lead back to the run itself", found, hint))
        return []


def _fault(path: str, expected: str, found: str, hint: str) -> Fault:
    return Fault(path=path, expected=expected, found=found, origin="command line", hint=hint)


def _choices(sweep: str) -> list[str]:
    key, equals, text = sweep.partition("=")
    values = [value.strip() for value in _split(text)]
    if not equals or not key.strip() or not all(values) or len(set(values)) < len(values):
        expected = "--vary must be written KEY=VALUE,VALUE,…, each value once"
        raise LaunchError(expected, repr(sweep), "Write --vary optimizer.lr=1e-4,3e-4")
    return [f"{key.strip()}={value}" for value in values]


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and braces."""
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
