"""The ids that offsets beyond the first score, V' of V, as a recipe keeps them: a set of bits in base64.

A recipe is written with a number of ids or a file of them; a run finds the ids when it starts and writes them into the
recipe that its checkpoints carry, so that they are the same wherever its model is loaded, on whatever data.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable

from mtp_lightning.recipe.schema.root import Recipe


def packed_ids(ids: Iterable[int]) -> str:
    """Write a set of ids as a text, about V/6 characters long.

    >>> packed_ids([9, 0, 2]), unpacked_ids("BQI=")
    ('BQI=', (0, 2, 9))
    """
    distinct = {*ids}
    bits = bytearray(max(distinct, default=-1) // 8 + 1)
    for number in distinct:
        bits[number // 8] |= 1 << number % 8
    return base64.b64encode(bits).decode()


def unpacked_ids(text: str) -> tuple[int, ...]:
    """Read the ids back, in ascending order.

    Raises:
        ValueError: The text is no such set.
    """
    try:
        bits = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    return tuple(8 * place + bit for place, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1)


def digest_of(ids: Iterable[int]) -> str:
    """Return the SHA-256 of the ids, by which two draft vocabularies are compared."""
    return hashlib.sha256(packed_ids(ids).encode()).hexdigest()


def draft_ids(recipe: Recipe) -> tuple[int, ...] | None:
    """Return the ids that a recipe's offsets beyond the first score, ascending; None where they score all V.

    Raises:
        ValueError: The recipe asks for some, and no run has chosen them yet.
    """
    heads = recipe.heads
    if heads.draft_vocabulary is None:
        return None
    if heads.draft_token_ids is None:
        raise ValueError("heads.draft_vocabulary asks for ids that are chosen when a run starts")
    return unpacked_ids(heads.draft_token_ids)


def draft_vocab_size(recipe: Recipe) -> int:
    """Return V', the number of ids that offsets beyond the first score; V where nothing is left out.

    Of a file that has not been read yet, nothing is known: it counts as V.

    >>> draft_vocab_size(Recipe())
    257
    """
    heads = recipe.heads
    if isinstance(heads.draft_vocabulary, int):
        return heads.draft_vocabulary
    if heads.draft_vocabulary is None or heads.draft_token_ids is None:
        return recipe.model.vocab_size
    return len(unpacked_ids(heads.draft_token_ids))


def with_draft_ids(recipe: Recipe, ids: Iterable[int]) -> Recipe:
    """Write ids into a recipe that asks for some."""
    return recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"draft_token_ids": packed_ids(ids)})})


def with_first_ids(recipe: Recipe) -> Recipe:
    """Let ids 0, 1, 2, ... stand for those that no run has chosen: for measuring what does not depend on which."""
    if recipe.heads.draft_vocabulary is None or recipe.heads.draft_token_ids is not None:
        return recipe
    return with_draft_ids(recipe, range(draft_vocab_size(recipe)))
