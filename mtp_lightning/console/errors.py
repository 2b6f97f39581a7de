"""What the command line prints: errors in three parts, aligned lines, nothing cut off; and what if it cannot print.

Stdout may be a pipe that its reader has closed, a file on a full disk, or not there at all.
"""

import io
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO, final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtp_lightning.console.screen import Screen
from mtp_lightning.errors import Fault, MtpError, RecipeError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell gives for `yes` in `yes | head -1`: no code of an error of ours
UNBOUNDED = 10_000
LABEL_WIDTH = 9
NARROWEST = 20


def screen(*, stderr: bool = False) -> Console:
    """Return a console that wraps on a terminal, and neither wraps nor colours into a pipe or file."""
    console = Screen(stderr=stderr, soft_wrap=True)
    if not console.is_terminal:
        console.width = UNBOUNDED
    return console


def table_of(columns: Sequence[str], *, left: int | None = None) -> Table:
    """Build an empty table of figures; the column at index `left` is aligned to the left."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == left else "right")
    return table


@final
class _Output(io.FileIO):
    """A descriptor that takes whatever is written to it; the first time that it cannot is answered."""

    def __init__(self, descriptor: int, answer: Callable[[OSError], object]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._answer: Callable[[OSError], object] | None = answer

    def write(self, content: "ReadableBuffer", /) -> int | None:  # type: ignore[override]
        """Write, or leave it."""
        try:
            return super().write(content)
        except OSError as error:
            answer, self._answer = self._answer, None
            if answer is not None:
                answer(error)
            return memoryview(content).nbytes


def guard_output(answer: Callable[[OSError], object]) -> None:
    """Answer the first failure to write to stdout, and leave those on stderr: what is lost there are messages.

    Replaces `sys.stdout` and `sys.stderr`, unless something else has done so before.

    Args:
        answer: called once; later failures are ignored.
    """
    _occupy_closed_descriptors()
    sys.stdout = _guarded(sys.stdout, 1, answer)
    sys.stderr = _guarded(sys.stderr, 2, lambda error: None)


def end_without_output(error: OSError, done: str | None = None) -> NoReturn:
    """End a command that is run for what it prints: quietly when its reader has gone, else saying why not."""
    if isinstance(error, BrokenPipeError):
        raise SystemExit(BROKEN_PIPE)
    hint = f"{done}; send the text" if done else "Send it"
    screen(stderr=True).print(
        f"error: stdout must take what is printed; found {error.strerror}. {hint} where there is room for it."
    )
    raise SystemExit(MtpError.exit_code)


_LOST: list[OSError] = []
"""Why stdout took nothing any more, while a verb went on."""


def finish_without_output() -> None:
    """Let a verb that writes files do its work to the end when its screen goes away; then it ends as others do at once.

    It is called where it is known that there will be files, before anything is printed.
    """
    guard_output(_LOST.append)


def end_of_lost_output() -> None:
    """End, as `end_without_output` does, a verb that has done its work and could not print all of it."""
    if _LOST:
        end_without_output(_LOST[0], "The files are written")


def go_on_without_output(error: OSError) -> None:
    """Say once that the screen of a run does not show it any more; its files do."""
    screen(stderr=True).print(
        f"stdout does not take what is printed ({error.strerror}): the run goes on, and its folder has all figures"
    )


def _guarded(stream: TextIO | None, descriptor: int, answer: Callable[[OSError], object]) -> TextIO:
    if stream is None:
        buffer = io.BufferedWriter(_Output(descriptor, answer))
        return io.TextIOWrapper(buffer, errors="backslashreplace", line_buffering=True)
    if not isinstance(stream, io.TextIOWrapper) or not _writes_to(stream, descriptor):
        return stream
    stream.flush()
    output = _Output(descriptor, answer)
    return io.TextIOWrapper(
        output if stream.write_through else io.BufferedWriter(output),
        stream.encoding,
        # what an encoding lacks, as ASCII does most, is written as escapes; the second is Python's own choice for ASCII
        "backslashreplace" if stream.errors in ("strict", "surrogateescape") else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):  # it has no descriptor, or is closed
        return False


def _occupy_closed_descriptors() -> None:
    """Keep files from getting the numbers of closed standard streams; as glibc does, with what cannot be written to."""
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


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
    parts = {"found": error.found, "hint": f"{error.hint.rstrip('.')}."}
    return _paragraph("error: ", error.expected, 0, width) + _labelled(parts, 2, width)


def fault_lines(fault: Fault, width: int) -> list[Text]:
    """Lay one fault of a recipe out, an empty line before it."""
    sentence = _paragraph("", f"{fault.path} {fault.expected}", 2, width, style="bold")
    where = None if fault.origin == fault.path else fault.origin
    parts = {"found": fault.found, "where": where, "nearest": fault.nearest, "hint": fault.hint}
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
