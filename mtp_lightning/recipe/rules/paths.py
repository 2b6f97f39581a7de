"""Rules of all fields that hold paths, which are known by their type."""

from functools import partial

from mtp_lightning.files.paths import remedy_for
from mtp_lightning.recipe.rules.base import Rule, value_at
from mtp_lightning.recipe.schema.field_types import Place, fields, options_of
from mtp_lightning.recipe.schema.paths import IsPath, texts_of
from mtp_lightning.recipe.schema.root import Recipe


def _remedy(field: str, recipe: Recipe, *, may_be_url: bool) -> str:
    """Say what to do about the first path of a field that cannot be used; nothing where all can be."""
    remedies = (remedy_for(text, may_be_url=may_be_url) for text in texts_of(value_at(recipe, field)))
    return next(filter(None, remedies), "")


def _rule_of(place: Place, mark: IsPath) -> Rule:
    field = ".".join(place.names)
    remedy = partial(_remedy, field, may_be_url=mark.may_be_url)
    where = "a URL or a path that can be looked up" if mark.may_be_url else "a path on this machine's file systems"
    return Rule(
        fields=(field,),
        holds=lambda recipe: not remedy(recipe),
        expected=f"must be {where}, in which ~ and $NAME can be expanded",
        hint=remedy,
    )


def _mark_of(place: Place) -> IsPath | None:
    """Return what marks a field, or the items of its list, as paths."""
    inner = [item for option in place.options if option.entry for item in options_of(option.entry)]
    limits = (limit for option in (*place.options, *inner) for limit in option.limits)
    return next((limit for limit in limits if isinstance(limit, IsPath)), None)


PATH_RULES = tuple(_rule_of(place, mark) for place in fields() if (mark := _mark_of(place)))
