"""Text as lm-evaluation-harness's class for Hugging Face models sees it: its tokens, ends, and turns of a chat."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np

from mtp_lightning.data.loading.corpus import check_largest_token
from mtp_lightning.data.tokenizers.base import Tokenizer
from mtp_lightning.data.tokenizers.beside import NAME, config_beside
from mtp_lightning.data.tokenizers.chat import ChatTemplate
from mtp_lightning.data.tokenizers.open import TOKENIZERS, open_chat_template, open_tokenizer
from mtp_lightning.errors import DataError
from mtp_lightning.files.paths import expanded, leads_to
from mtp_lightning.recipe import Recipe

MOST_BYTE_IDS = 512  # of a model of bytes, whose vocabulary may be rounded up; a model with more has a tokenizer
CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers' `apply_chat_template`


@final
class HarnessText:
    """Encodes and decodes as a tokenizer of transformers does: special tokens parsed, a begin of sequence added.

    Attributes:
        end: id that ends a text.
        prefix: id that stands before a text without context: begin of sequence, or the end.
        end_text: how the end is spelled; empty for bytes.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Open the tokenizer of a recipe.

        Raises:
            DataError: The model has none, or one with more ids than it has rows.
        """
        spec = recipe.data.tokenizer
        if spec == "byte" and recipe.model.vocab_size > MOST_BYTE_IDS:
            raise DataError(
                "tasks are texts: a model must have its tokenizer",
                f"none, and {recipe.model.vocab_size:,} ids, too many for bytes",
                "Put the tokenizer.json of the model beside its weights and import it again, or name it as "
                "data.tokenizer in its recipe.yaml",
            )
        self.recipe = recipe
        self.tokenizer = _open(recipe, spec)
        check_largest_token(self.tokenizer.vocab_size - 1, recipe.model.vocab_size, f"the tokenizer {spec}")
        self.end = self.tokenizer.end_of_document
        begin = _begin_token(spec)
        self.prefix = self._special.get(begin, self.end) if begin is not None else self.end
        spelled = {number: text for text, number in self._special.items()}
        self.end_text, self._prefix_text = spelled.get(self.end, ""), spelled.get(self.prefix, "")

    @cached_property
    def _special(self) -> dict[str, int]:
        """Ids of the special tokens, by their spelling."""
        if not self.tokenizer.parses_special_tokens:
            return {}
        ids = {text: self.tokenizer.encode(text.encode()).tolist() for text in self.tokenizer.special_tokens}
        return {text: own[0] for text, own in ids.items() if len(own) == 1}

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text; unless told, what begins a sequence is added where the text does not spell it.

        Raises:
            DataError: The text cannot be written in UTF-8.
        """
        if add_special_tokens is None:
            add_special_tokens = not (self._prefix_text and text.startswith(self._prefix_text))
        try:
            ids = self.tokenizer.encode(text.encode()).tolist()
        except UnicodeEncodeError:
            found = ascii(text[:60])
            raise DataError("a text of a task must be one that UTF-8 can write", found, "Correct its data") from None
        return [*self.tokenizer.opening, *ids, *self.tokenizer.closing] if add_special_tokens else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of new tokens by themselves, without special ones."""
        special = set(self._special.values())
        kept = [token for token in tokens if token not in special]
        return self.tokenizer.decode(np.asarray(kept, dtype=np.int64)).decode(errors="replace")

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            DataError: There is none.
        """
        template = open_chat_template(self.recipe.data.tokenizer, self.recipe.data.chat_template)
        if template is None:
            raise DataError(
                "tasks as chats need a chat template beside the model's tokenizer",
                f"none beside {self.recipe.data.tokenizer}",
                "Leave the chat template out (--chat), or put the chat_template.jinja of the model there",
            )
        return template

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Return the text of a chat; without a prompt for the next turn, its last turn is to be gone on with.

        A template that refuses the chat gets it without the turns of the system.

        Raises:
            DataError: The template does not take it.
        """
        try:
            return self._rendered(messages, add_generation_prompt=add_generation_prompt)
        except DataError:
            others = [one for one in messages if one["role"] != "system"]
            if len(others) == len(messages):
                raise
            return self._rendered(others, add_generation_prompt=add_generation_prompt)

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.template.render(messages, add_generation_prompt=True)
        *before, last = messages
        text = self.template.render([*before, {**last, "content": last["content"] + CONTINUED}])
        place = text.rfind(CONTINUED.strip())
        if place < 0:
            expected = "the chat template must write the last turn, for it to be gone on with"
            raise DataError(expected, last["content"][:60], "Leave the chat template out (--chat)")
        return text[:place] if text[place:].startswith(CONTINUED) else text[:place].rstrip()


def _open(recipe: Recipe, spec: str) -> Tokenizer:
    path = Path(expanded(spec))
    parses = spec not in TOKENIZERS and path.suffix != ".model"  # neither bytes nor SentencePiece have special tokens
    return open_tokenizer(
        spec, end_of_document=recipe.data.end_of_document, parse_special_tokens=parses, add_special_tokens=parses
    )


def _begin_token(spec: str) -> str | None:
    path = Path(expanded(spec))
    if spec in TOKENIZERS:
        return None
    return config_beside(path / NAME if leads_to(path, Path.is_dir) else path).tokens.get("bos_token")
