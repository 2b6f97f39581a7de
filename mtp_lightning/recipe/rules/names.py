"""Names of files and folders that no file system takes: told of every path in a recipe, before any is opened."""

from collections.abc import Iterator, Mapping

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.rules.base import value_at
from mtp_lightning.recipe.schema.describe import found
from mtp_lightning.recipe.schema.root import Recipe

PATHS = (
    *("run.dir", "run.cache", "init.path", "strategy.nvme_path", "data.tokenizer", "data.shards", "data.mixture"),
    *("data.corpus", "data.stream.train", "data.stream.validation"),
)
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 3800  # Linux takes 4095; what a run writes beneath run.dir has to fit as well


def check_names(recipe: Recipe, origins: Mapping[str, str]) -> list[Fault]:
    """Return a fault for each path that is longer, or holds a longer name, than systems take.

    >>> recipe = Recipe.model_validate({"run": {"dir": f"runs/{'x' * 300}"}})
    >>> [fault.path for fault in check_names(recipe, {})]
    ['run.dir']
    """
    return [
        Fault(
            path=field,
            expected=f"must be a path of names of at most {MOST_NAME_BYTES} bytes each, "
            f"{MOST_PATH_BYTES:,} in all: file systems take no longer ones",
            found=found(path),
            origin=origins.get(field, "default"),
            hint="Shorten it.",
        )
        for field in PATHS
        for path in _texts(value_at(recipe, field))
        if "://" not in path and _is_too_long(path)
    ]


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        yield from value


def _is_too_long(path: str) -> bool:
    """Patterns with braces or wildcards are judged by what they stand for, when it is opened."""
    if len(path.encode(errors="replace")) > MOST_PATH_BYTES:
        return True
    return not set("{*?[") & set(path) and any(
        len(name.encode(errors="replace")) > MOST_NAME_BYTES for name in path.split("/")
    )
