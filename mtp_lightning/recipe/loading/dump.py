"""A recipe back to YAML: every field, in the order of the sections."""

from mtp_lightning.recipe.diff import is_named_sections
from mtp_lightning.recipe.schema.base import Section
from mtp_lightning.recipe.schema.model import OWN_ONLY, ModelSection
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.yaml import one_line_yaml


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write the resolved recipe: itself a valid recipe, which loads as an equal one.

    Defaults of fields that a model of transformers does not read are left out: they would say what is not so.

    >>> print(recipe_to_yaml(Recipe()).partition("  num_")[0])
    name: default
    model:
      hidden_size: 256
    <BLANKLINE>
    """
    return "".join(f"{line}\n" for line, _ in yaml_lines(recipe))


def yaml_lines(section: Section, prefix: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return the lines of YAML, each with the dotted path of its field."""
    indent = "  " * len(prefix)
    lines: list[tuple[str, str]] = []
    unread = OWN_ONLY if isinstance(section, ModelSection) and section.is_foreign else ()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name in unread and value == field.default:
            continue
        path = (*prefix, name)
        if isinstance(value, Section):
            lines += [(f"{indent}{name}:", ".".join(path)), *yaml_lines(value, path)]
        elif is_named_sections(value):
            lines.append((f"{indent}{name}:", ".".join(path)))
            for key, entry in value.items():
                lines += [
                    (f"{indent}  {one_line_yaml(key)}:", ".".join((*path, key))),
                    *yaml_lines(entry, (*path, key)),
                ]
        else:
            lines.append((f"{indent}{name}: {one_line_yaml(value)}", ".".join(path)))
    return lines
