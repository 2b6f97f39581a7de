"""The section of a phase: what differs from the recipe for one stretch of a run."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from mtp_lightning.recipe.schema.base import Offsets, Section
from mtp_lightning.recipe.schema.model import FrozenPart
from mtp_lightning.recipe.schema.paths import with_expanded_texts

FOLDER = "phases"
"""Where the run folders of phases lie in the run's own."""


class PhaseSection(Section):
    """One stretch of a run in phases: the recipe with changes, trained from where the phase before ended.

    Changes hold for their own phase only; what an extension adds stays for the phases after it.
    """

    extend_to: Offsets | None = None
    """Give the model this many offsets first, the new heads as copies of trained ones; only they are trained, unless
    `freeze` says otherwise."""
    extend_group: Offsets | None = None
    """How many trained heads are copied again and again, the last ones; null means all beyond the first."""
    keep_optimizer: bool = False
    """Go on with the optimizer's state of the phase before, which must have trained the same parameters."""
    freeze: list[FrozenPart] | None = None
    """Parts that are not trained in this phase, in place of the recipe's `freeze`; null means the recipe's."""
    heads: dict[str, Any] = Field(default_factory=dict)
    """Changes of `heads`: `detach_trunk`."""
    adapt: dict[str, Any] = Field(default_factory=dict)
    """Changes of `adapt`; updates and mixtures of a phase cannot be left out by those after it."""
    objective: dict[str, Any] = Field(default_factory=dict)
    """Changes of `objective`."""
    memory: dict[str, Any] = Field(default_factory=dict)
    """Changes of `memory`."""
    data: Annotated[dict[str, Any], AfterValidator(with_expanded_texts)] = Field(default_factory=dict)
    """Changes of `data`."""
    batch: dict[str, Any] = Field(default_factory=dict)
    """Changes of `batch`."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Changes of `optimizer`; warm-up and decay of the learning rate span the phase."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Changes of `run`, such as `steps`, which are the phase's own."""
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    """Changes of `checkpoint`: `every_steps` and `keep`."""
    logging: dict[str, Any] = Field(default_factory=dict)
    """Changes of `logging`: `every_steps`."""
    health: dict[str, Any] = Field(default_factory=dict)
    """Changes of `health`: `drift`, `hang_after_s` and `hang_factor`."""
