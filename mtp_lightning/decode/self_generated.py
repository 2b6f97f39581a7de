"""Text that a model writes itself, to train heads on it: what drafts will be compared with is what they have seen."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from mtp_lightning.data.generated.log import TextLog
from mtp_lightning.data.generated.shards import TokenDocument
from mtp_lightning.data.shards.encode import held_out_rank, split_of
from mtp_lightning.decode.generation import generate
from mtp_lightning.decode.settings import Settings, check_prompts
from mtp_lightning.errors import DataError, DecodingError
from mtp_lightning.model.mtp_model import MtpModel

Prompts = Sequence[Sequence[int]]


@final
@dataclass(frozen=True, kw_only=True)
class OwnText:
    """What a model is to write."""

    num_documents: int
    settings: Settings  # stop tokens: the end of a document; the seed is that of the first batch
    end_of_document: int
    batch_rows: int = 16
    train_on_prompt: bool = False  # else only continuations are targets
    validation_fraction: float


@final
class Writer:
    """Writes documents, one batch of prompts after the other, until there are enough; no two are equal."""

    def __init__(self, model: MtpModel, prompts: Prompts, wanted: OwnText) -> None:
        """Check the prompts.

        Raises:
            DecodingError: There is none, or one does not fit the model.
            DataError: All would fall into one split.
        """
        if not prompts:
            raise DecodingError("a model's own text must begin with prompts", "none", "Give longer documents or lines")
        check_prompts(model, prompts, wanted.settings.max_new_tokens)
        _check_share(min(len(prompts), wanted.num_documents), wanted.validation_fraction)
        self.num_duplicates = 0
        self._model, self._prompts, self._wanted = model, prompts, wanted
        self._seen: set[bytes] = set()

    def documents(self, log: TextLog, advance: Callable[[int], None]) -> Iterator[TokenDocument]:
        """Write; `advance` is told of documents.

        Texts that are in the log are taken from there, the others added to it: what a batch says depends on its
        place, its prompts and the settings only. Prompts are gone through again and again, under other seeds; it ends
        early where a whole round brings nothing new. Documents of one prompt are held out together.
        """
        wanted, num_made = self._wanted, 0
        num_rounds = 0
        while num_made < wanted.num_documents:
            made_before = num_made
            for first in range(0, len(self._prompts), wanted.batch_rows):
                for document in self._batch(log, first, num_rounds):
                    yield document
                    num_made += 1
                    advance(1)
                    if num_made == wanted.num_documents:
                        return
            num_rounds += 1
            if num_made == made_before or wanted.settings.temperature == 0:
                return

    def _batch(self, log: TextLog, first: int, num_rounds: int) -> Iterator[TokenDocument]:
        """Continue some prompts; leave out what has been written before."""
        prompts = self._prompts[first : first + self._wanted.batch_rows]
        texts = log.replay(len(prompts))
        if texts is None:
            seed = self._wanted.settings.seed + num_rounds * len(self._prompts) + first
            texts = generate(self._model, prompts, replace(self._wanted.settings, seed=seed)).tokens
            log.append(texts)
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=first):
            if self._is_new([*prompt, -1, *text]):
                yield self._document(list(prompt), text, rank=_rank(number))
            else:
                self.num_duplicates += 1

    def _is_new(self, tokens: list[int]) -> bool:
        digest = hashlib.blake2b(torch.tensor(tokens).numpy().tobytes(), digest_size=16).digest()
        is_new = digest not in self._seen
        self._seen.add(digest)
        return is_new

    def _document(self, prompt: list[int], text: list[int], *, rank: float) -> TokenDocument:
        """Join prompt and text; an end that the model has not written is not learnt."""
        end = self._wanted.end_of_document
        is_learnt = [self._wanted.train_on_prompt] * len(prompt) + [True] * len(text)
        if text[-1] == end:
            return TokenDocument([*prompt, *text], is_learnt, rank)
        return TokenDocument([*prompt, *text, end], [*is_learnt, False], rank)


def _check_share(num_prompts: int, validation_fraction: float) -> None:
    """Refuse prompts of which none, or all, would be held out, before a word is written."""
    ranks = sorted(_rank(number) for number in range(num_prompts))
    if len({split_of(rank, validation_fraction) for rank in ranks}) == 1:
        share = (
            f"Give --validation-fraction {sum(ranks[:2]) / 2:.3g}, which holds out one, or " if num_prompts > 1 else ""
        )
        raise DataError(
            "both splits must get at least one document",
            f"{num_prompts:,} prompts that all fall into one split at a share of {validation_fraction} held out",
            f"{share}ask for more documents from more prompts",
        )


def _rank(prompt: int) -> float:
    return held_out_rank(f"prompt {prompt}")
