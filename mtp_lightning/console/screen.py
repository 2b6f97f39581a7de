"""The console that everything is printed on: texts as they are, and what would change the terminal as escapes."""

from collections.abc import Iterable
from typing import Any, final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from mtp_lightning.errors import visible


@final
class Screen(Console):
    """A console on which no text can be more than text: names of runs, sources and tensors come from anywhere."""

    def __init__(self, *, stderr: bool = False, width: int | None = None, **options: Any) -> None:
        """Leave markup, emoji and highlighting off: a name may hold brackets and colons."""
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Make control characters visible; what moves the cursor, or colours, is no text."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or (text.isascii() and text.isprintable()) else Segment(visible(text), style)
