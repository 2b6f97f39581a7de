"""Which ids may be drafted: the most frequent of a recipe's training data, or those of a file."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.corpus import folder_of, recipe_tokenizer, shards_folder
from mtp_lightning.data.loading.factory import prepare_data, shard_cache_of
from mtp_lightning.data.shards.token_counts import token_counts
from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import (
    MOST_JSON_BYTES,
    NO_TEXT,
    OddFileError,
    read_bounded,
    read_json,
    reason_of,
    shown,
)
from mtp_lightning.recipe.draft_vocabulary import digest_of
from mtp_lightning.recipe.schema.root import Recipe


def choose_draft_ids(recipe: Recipe) -> tuple[int, ...]:
    """Find the ids that a recipe's `heads.draft_vocabulary` asks for, ascending, and say what they cover.

    The end of a document is one of them: for it a number of ids gives up the rarest, and a file need not name it.

    Raises:
        DataError: The file holds no ids of the model's vocabulary, each once; or the data cannot be prepared.
    """
    wanted = recipe.heads.draft_vocabulary
    assert wanted is not None
    end = recipe_tokenizer(recipe).end_of_document
    if isinstance(wanted, str):
        ids = tuple(sorted({*read_ids(Path(wanted), recipe.model.vocab_size), end}))
        where = f"from {wanted}"
    else:
        shares = _shares(recipe)
        ids = most_frequent(shares, wanted, end)
        never = int((shares[list(ids)] == 0).sum())
        where = f"{shares[list(ids)].sum():.2%} of the training targets" + (
            f"; {never:,} of them do not occur there" if never else ""
        )
    digest = digest_of(ids)[:12]
    say(f"draft vocabulary: {len(ids):,} of {recipe.model.vocab_size:,} ids, {where} (sha256 {digest})", stderr=True)
    return ids


def most_frequent(shares: NDArray[np.float64], number: int, end: int) -> tuple[int, ...]:
    """Choose ids by their share of the tokens, (V,), the smaller id first where shares are equal, `end` always.

    >>> most_frequent(np.array([0.5, 0.1, 0.3, 0.1]), 3, end=3)
    (0, 2, 3)
    """
    order = np.argsort(-shares, kind="stable")
    chosen = {int(token) for token in order[:number]}
    if end not in chosen:
        chosen = {*(int(token) for token in order[: number - 1]), end}
    return tuple(sorted(chosen))


def read_ids(path: Path, vocab_size: int) -> list[int]:
    """Read a file of ids: a list in JSON, or a text of numbers between blanks, line ends or commas.

    Raises:
        DataError: It cannot be read, holds something else, an id twice, or one that the model lacks.
    """
    try:
        ids = _json_ids(path) if path.suffix == ".json" else _text_ids(path)
    except (OSError, OddFileError) as error:
        raise _refused(path, reason_of(error)) from None
    if not ids:
        raise _refused(path, "no id")
    if strange := [number for number in ids if not 0 <= number < vocab_size]:
        raise _refused(path, f"id {shown(strange[0])}, and the model's are 0 to {vocab_size - 1:,}")
    if len({*ids}) < len(ids):
        seen: set[int] = set()
        twice = next(number for number in ids if number in seen or seen.add(number))  # type: ignore[func-returns-value]
        raise _refused(path, f"id {twice:,} twice")
    return ids


def _json_ids(path: Path) -> list[int]:
    ids = read_json(path)
    if not isinstance(ids, list) or any(type(number) is not int for number in ids):
        raise OddFileError("something other than a list of whole numbers")
    return ids


def _text_ids(path: Path) -> list[int]:
    try:
        words = read_bounded(path, MOST_JSON_BYTES).decode().replace(",", " ").split()
    except UnicodeDecodeError:
        raise OddFileError(NO_TEXT) from None
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) <= 12):
            raise OddFileError(f"{shown(word)!r} in place of an id")
    return [int(word) for word in words]


def _refused(path: Path, found: str) -> DataError:
    return DataError(
        "heads.draft_vocabulary must name a file of token ids, each once: a JSON list, or a text of numbers",
        f"{found}, in {path}",
        "Correct the file, or give a number, and the most frequent ids of the training data are taken",
    )


def _shares(recipe: Recipe) -> NDArray[np.float64]:
    """Return the share of every id in what a recipe trains on, sources of a mixture by their weights: (V,)."""
    prepare_data(recipe)
    names = recipe.data.mixture or {recipe.data.shards or str(shards_folder(recipe)): 1.0}
    shares = np.zeros(recipe.model.vocab_size)
    for name, weight in names.items():
        counts = token_counts(folder_of(recipe, name), Path(recipe.run.cache), shard_cache_of(recipe, name))
        known = counts[: shares.size]  # larger ids are refused when the data are opened
        shares[: known.size] += weight * known / max(1, counts.sum())
    return shares / sum(names.values())
