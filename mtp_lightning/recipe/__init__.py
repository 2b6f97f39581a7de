"""A run as a value: frozen, typed, checked as a whole, and read without torch.

A recipe is a YAML file of sections (`sections.py`). It may extend one parent (`extends: base.yaml`), and
`key=value` arguments on the command line are laid over it. `load_recipe` collects every fault before it raises:
of the files (`loading.py`, `reading.py`), of names, types and bounds (`checking.py`), and between fields (`rules.py`).

To add a field, give it a type, a default and a docstring in its section; messages, `mtp recipe show` and the
comparison of recipes follow from that. To tie fields together, add a row to the table in `rules.py`. If a field does
not change the numbers of a run, name it in `RUN_FIELDS` in `comparing.py`. What other frameworks call a field, and
what it was called here before, stands in `synonyms.py`.
"""

from mtp_lightning.recipe.diff import (
    RUN_FIELDS,
    FieldChange,
    FieldDiff,
    changed_fields,
    diff_recipes,
    recipe_hash,
)
from mtp_lightning.recipe.layer_counts import num_head_layers, num_trunk_layers
from mtp_lightning.recipe.loading.dump import recipe_to_yaml
from mtp_lightning.recipe.loading.load import LoadedRecipe, load_recipe
from mtp_lightning.recipe.rules.all import check_rules
from mtp_lightning.recipe.schema.root import Recipe

__all__ = [
    "RUN_FIELDS",
    "FieldChange",
    "FieldDiff",
    "LoadedRecipe",
    "Recipe",
    "changed_fields",
    "check_rules",
    "diff_recipes",
    "load_recipe",
    "num_head_layers",
    "num_trunk_layers",
    "recipe_hash",
    "recipe_to_yaml",
]
