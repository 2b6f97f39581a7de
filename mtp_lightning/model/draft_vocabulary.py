"""The ids that offsets beyond the first score, as tensors: from the vocabulary of V ids to that of V', and back."""

from typing import NamedTuple, final

import torch
from torch import Tensor

from mtp_lightning.errors import Fault, RecipeError
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.recipe.draft_vocabulary import unpacked_ids
from mtp_lightning.recipe.schema.root import Recipe

OUTSIDE = "outside_draft_vocabulary"
"""Name of a figure: the share of an offset's targets that are not in the draft vocabulary."""


class _Tables(NamedTuple):
    ids: Tensor  # (V',) ascending
    places: Tensor  # (V,) where an id stands among them; `IGNORE` for one that is left out


@final
class DraftVocabulary:
    """V' ids of V, ascending. Its tensors are no part of the model: they lie on every device that asks for them."""

    def __init__(self, ids: tuple[int, ...], vocab_size: int) -> None:
        self.size, self.vocab_size = len(ids), vocab_size
        self._ids = ids
        self._on: dict[torch.device, _Tables] = {}

    def __reduce__(self) -> tuple[type["DraftVocabulary"], tuple[tuple[int, ...], int]]:
        return DraftVocabulary, (self._ids, self.vocab_size)

    def on(self, device: torch.device) -> _Tables:
        """Return the ids and their places on a device."""
        if device not in self._on:
            with torch.inference_mode(mode=False):  # autograd shall be able to keep them
                ids = torch.tensor(self._ids, device="cpu")
                places = torch.full((self.vocab_size,), IGNORE, device="cpu")
                places[ids] = torch.arange(len(ids), device="cpu")
                self._on[device] = _Tables(ids.to(device), places.to(device))
        return self._on[device]

    def places_of(self, targets: Tensor) -> Tensor:
        """Renumber targets, which may be `IGNORE`; those that are left out become `IGNORE`."""
        places = self.on(targets.device).places[targets.clamp(min=0)]
        return torch.where(targets == IGNORE, IGNORE, places)

    def lacks(self, tokens: Tensor) -> Tensor:
        """Tell which ids are left out; `IGNORE` is not."""
        return (self.places_of(tokens) == IGNORE) & (tokens != IGNORE)

    def spoken(self, places: Tensor) -> Tensor:
        """Turn numbers below V' into the ids that they stand for."""
        return self.on(places.device).ids[places]

    def rows_of(self, matrix: Tensor) -> Tensor:
        """Select the rows of a matrix that score the ids: (V, D) -> (V', D)."""
        return matrix.index_select(0, self.on(matrix.device).ids)

    def columns_of(self, scores: Tensor) -> Tensor:
        """Select the scores of the ids: (..., V) -> (..., V')."""
        return scores.index_select(-1, self.on(scores.device).ids)

    def spread(self, values: Tensor, rest: float) -> Tensor:
        """Lay values of the ids among those of all, each of which is `rest`: (..., V') -> (..., V)."""
        whole = values.new_full((*values.shape[:-1], self.vocab_size), rest)
        return whole.index_copy(-1, self.on(values.device).ids, values)


def draft_vocabulary_of(recipe: Recipe) -> DraftVocabulary | None:
    """Return a recipe's draft vocabulary; None where every offset scores all V.

    Raises:
        RecipeError: It asks for one that has not been chosen.
    """
    packed = recipe.heads.draft_token_ids
    if recipe.heads.draft_vocabulary is None:
        return None
    if packed is None:
        raise RecipeError(
            [
                Fault(
                    path="heads.draft_token_ids",
                    expected="must hold the ids of heads.draft_vocabulary before a model is built",
                    found="null",
                    origin="default",
                    hint="`mtp train` and a Trainer's fit choose them when they start; to build a model by hand, take "
                    "the recipe that mtp_lightning.training.draft_vocabulary.with_draft_vocabulary returns.",
                )
            ]
        )
    return DraftVocabulary(unpacked_ids(packed), recipe.model.vocab_size)
