"""What a user should know about shards that were just built, one line each."""

from collections import Counter
from collections.abc import Iterator

from mtp_lightning.data.tokenizers.chat import ChatTemplate


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
