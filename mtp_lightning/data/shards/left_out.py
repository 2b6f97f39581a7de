"""What a build tells when it is done: what it left out, the first faults by name, and what may surprise."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import final

from mtp_lightning.data.text.documents import HINTS, JSON_AS_TEXT
from mtp_lightning.data.text.records import LeftOut
from mtp_lightning.data.text.sources import spelled
from mtp_lightning.data.tokenizers.chat import ChatTemplate

MOST_NAMED = 10


@final
class LeftOutCounts:
    """Counts of what became no document."""

    def __init__(self) -> None:
        self.fates = Counter[str]()  # of documents that are empty, not UTF-8 or duplicates
        self.files = Counter[str]()  # that are no text
        self.rows = Counter[str]()  # faults
        self.json_as_text = Counter[str]()
        self._named: list[LeftOut] = []

    def add(self, found: tuple[LeftOut, ...]) -> None:
        """Count what a block left out."""
        for one in found:
            if one.is_fault:
                self.rows[one.kind] += 1
                self._named += [one] if len(self._named) < MOST_NAMED else []
            else:
                (self.json_as_text if one.kind == JSON_AS_TEXT else self.files)[one.kind] += 1

    def say(self, tell: Callable[[str], None]) -> None:
        """Tell, in few lines, what a user would not expect."""
        if self.rows:
            tell(f"left out {sum(self.rows.values()):,} that are no documents: {spelled(self.rows)}")
            for one in self._named:
                tell(f"  {one.place}: {one.found}")
        if set(self.files) - {"binary"}:
            tell(f"left out as no text: {spelled(self.files)}")
        if self.json_as_text:
            tell(spelled(self.json_as_text))

    def found(self, num_files: int) -> str:
        """Say what there was where no document is left."""
        fates = {"empty documents": self.fates["empty"], "documents that are not UTF-8": self.fates["not_utf8"]}
        found = Counter(fates) + self.files + self.rows + self.json_as_text
        return f"{num_files:,} files with {spelled(found) or 'nothing in them'}"

    def hint(self) -> str:
        """Say what to do where no document is left."""
        if self.fates["not_utf8"]:
            return "Give the encoding of the texts: data.encoding (--encoding)"
        if self.json_as_text:
            return "Name the field that holds the text: data.text_field (--text-field)"
        kinds = (self.files + self.rows).most_common()
        return next((HINTS[kind] for kind, _ in kinds if kind in HINTS), "Correct data.corpus")


def remarks(notes: Counter[str], tokenizer: str, template: ChatTemplate | None) -> Iterator[str]:
    """Yield a line for each thing that may surprise: text that is lost, turns not learnt, dates in chats.

    Args:
        notes: counts of `round_trip`, and of chats and their turns.
        tokenizer: its name.
        template: the chat template, if there is one.
    """
    if notes["changed"]:
        changed, beyond = (f"{notes[name] / notes['sampled']:.1%}" for name in ("changed", "beyond_spaces"))
        unknown = f"{notes['unknown'] / max(1, notes['tokens']):.1%}"
        yield (
            f"{tokenizer} does not give every text back: of {notes['sampled']:,} documents sampled, {changed} change "
            f"({beyond} in more than white space), and {unknown} of their tokens are unknown ones"
        )
    if notes["unlearnt"]:
        yield (
            f"{notes['unlearnt']:,} of {notes['turns']:,} turns of assistants are only read, not learnt: the chat "
            "template writes them in another way when more turns follow; mark what is learnt with {% generation %}"
        )
    if notes["chats"] and template and template.writes_date:
        yield "the chat template writes today's date into chats; set SOURCE_DATE_EPOCH to build the same shards again"
