"""What the command line prints: errors in three parts, aligned lines, nothing cut off."""

import os
import sys
import textwrap
import traceback
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from mtp_lightning.errors import Fault, MtpError, RecipeError

UNBOUNDED = 10_000
LABEL_WIDTH = 9
NARROWEST = 20


def screen(*, stderr: bool = False) -> Console:
    """Return a console that wraps on a terminal, and neither wraps nor colours into a pipe or file."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = UNBOUNDED
    return console


def print_error(error: MtpError) -> None:
    """Print what must hold, what was found and what to do, on stderr; with MTP_TRACEBACK=1 the traceback too."""
    if os.environ.get("MTP_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)
    console = screen(stderr=True)
    for line in error_lines(error, console.width):
        console.print(line)


def error_lines(error: MtpError, width: int) -> list[Text]:
    """Lay an error out as lines of at most `width` characters, words that are longer excepted."""
    if isinstance(error, RecipeError):
        num_faults = len(error.faults)
        headline = _paragraph("error: ", f"{num_faults} fault{'s' if num_faults > 1 else ''} to correct", 0, width)
        return headline + [line for fault in error.faults for line in fault_lines(fault, width)]
    parts = {"found": error.found, "remedy": f"{error.remedy.rstrip('.')}."}
    return _paragraph("error: ", error.must_hold, 0, width) + _labelled(parts, 2, width)


def fault_lines(fault: Fault, width: int) -> list[Text]:
    """Lay one fault of a recipe out, an empty line before it."""
    sentence = _paragraph("", f"{fault.path} {fault.must_hold}", 2, width, style="bold")
    where = None if fault.origin == fault.path else fault.origin
    parts = {"found": fault.found, "where": where, "nearest": fault.nearest, "remedy": fault.remedy}
    return [Text(), *sentence, *_labelled(parts, 4, width)]


def _labelled(parts: Mapping[str, str | None], indent: int, width: int) -> list[Text]:
    lines: list[Text] = []
    for label, text in parts.items():
        if text:
            lines += _paragraph(label.ljust(LABEL_WIDTH), text, indent, width, label_style="cyan")
    return lines


def _paragraph(
    label: str, text: str, indent: int, width: int, *, style: str = "", label_style: str = "bold red"
) -> list[Text]:
    """Wrap text with a hanging indent under its label; paths and other long words stay whole, and so do lines."""
    hanging = " " * (indent + len(label))
    room = max(width - len(hanging), NARROWEST)
    wrapped = [part for line in text.strip().splitlines() for part in _wrap(line, room)]
    first, *others = wrapped or [""]
    head = Text.assemble(" " * indent, (label, label_style), (first, style))
    return [head, *(Text.assemble(hanging, (line, style)) for line in others)]


def _wrap(line: str, room: int) -> list[str]:
    """Wrap one line; what it continues in is indented as it is."""
    own_indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line, room, subsequent_indent=own_indent, break_long_words=False, break_on_hyphens=False, tabsize=4
    )
