"""What every section of a recipe is, and the bounds that fields share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST_INT = 10**12
LARGEST, SMALLEST = 1e15, 1e-30
"""Bounds of all numbers that have no closer ones: what is made of them still fits int64 and fp32."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, ge=SMALLEST, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_INT)]
AtLeastTwo = Annotated[int, Field(ge=2, le=LARGEST_INT)]
PositiveFloat = Annotated[float, Field(gt=0.0, ge=SMALLEST, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=LARGEST)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Offsets = Annotated[int, Field(ge=1, le=1000)]
Rows = Annotated[int, Field(ge=1, le=1_000_000)]


@dataclass(frozen=True)
class Choices:
    """Marks a field of text whose values are known only when it is read."""

    names: Callable[[], tuple[str, ...]]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
