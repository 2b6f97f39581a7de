"""Paths that a run writes to or starts from: on file systems of this machine, and written out."""

from mtp_lightning.recipe.rules.base import Rule, value_at
from mtp_lightning.recipe.rules.data import is_url
from mtp_lightning.recipe.schema.root import Recipe


def _is_written_out(path: str | None, *, may_be_home: bool) -> bool:
    """Say whether a path is one as it stands.

    >>> [_is_written_out(path, may_be_home=False) for path in ("runs/a", "", "s3://b/x", "~/x", "$SCRATCH/x", None)]
    [True, False, False, False, False, True]
    """
    if path is None:
        return True
    return bool(path.strip()) and not is_url(path) and not ({"$", "\0"} & set(path)) and (may_be_home or path[0] != "~")


def _path_rule(field: str, *, may_be_home: bool = False) -> Rule:
    def holds(recipe: Recipe) -> bool:
        return _is_written_out(value_at(recipe, field), may_be_home=may_be_home)

    unexpanded = "no $, which nothing expands" if may_be_home else "no ~ or $, which nothing expands"
    return Rule(
        fields=(field,),
        holds=holds,
        expected=f"must be a path on this machine's file systems: not empty, no URL, {unexpanded} here",
        hint=f'Write it out; a shell expands "{field}=$SCRATCH/x" before it gets here.',
    )


PATH_RULES = (_path_rule("run.dir"), _path_rule("init.path"), _path_rule("run.cache", may_be_home=True))
