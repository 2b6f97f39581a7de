"""What shards hold: documents, tokens and lengths, by folder and by source, as tables and as pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from mtp_lightning.console.plots import label_of, save_picture
from mtp_lightning.console.progress import say
from mtp_lightning.console.screen import Screen
from mtp_lightning.data.shards.integrity import MemberChecks
from mtp_lightning.data.shards.manifest import Manifest, Split, load_manifest
from mtp_lightning.data.shards.mapped import bytes_of, check_sizes
from mtp_lightning.files.untrusted import shown

BAR_WIDTH = 40
PIPED_WIDTH = 100
Lengths = NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Documents whose lengths lie between a power of two and the next."""

    low_tokens: int
    num_documents: int
    num_tokens: int

    @property
    def label(self) -> str:
        """The lengths in the bin."""
        return f"{self.low_tokens:,} - {2 * self.low_tokens - 1:,}" if self.low_tokens > 1 else "1"


def show_statistics(folders: list[Path], *, picture: Path | None) -> None:
    """Print what folders of shards hold, and draw the lengths of their documents into a PNG if one is named.

    Reads manifests and document lengths, and no token.

    Raises:
        DataError: A folder is damaged, or the picture cannot be written.
    """
    manifests = {folder: load_manifest(folder) for folder in folders}
    lengths = {folder: lengths_of(folder, manifests[folder]) for folder in folders}
    console = Screen()
    if not console.is_terminal:
        console = Screen(width=PIPED_WIDTH)
    console.print(_counts_table(manifests, lengths))
    for folder in folders:
        console.print(_histogram_table(folder, bins_of(lengths[folder])))
    if picture:
        _draw(lengths, picture)


def lengths_of(folder: Path, manifest: Manifest, split: Split | None = None) -> Lengths:
    """Return the lengths in tokens of all documents of one split, or of both.

    Raises:
        DataError: A shard is missing, has another size, or other lengths than were written.
    """
    check_sizes(folder, manifest)
    found = [np.array([], dtype="<u4")]
    for shard in manifest.shards:
        if split in (None, shard.split):
            path = folder / shard.lengths_name
            found += MemberChecks(shard, bytes_of(path), str(path), token_bytes=1).lengths()
    return np.concatenate(found)


def bins_of(lengths: Lengths) -> list[Bin]:
    """Sort documents by length into bins that double.

    >>> [(one.label, one.num_documents, one.num_tokens) for one in bins_of(np.array([1, 3, 2, 9], dtype="<u4"))]
    [('1', 1, 1), ('2 - 3', 2, 5), ('4 - 7', 0, 0), ('8 - 15', 1, 9)]
    """
    places = np.frexp(lengths.astype(np.float64))[1] - 1  # floor(log2), exact
    documents = np.bincount(places)
    tokens = np.bincount(places, weights=lengths)  # exact below 2**53 tokens
    first = int(places.min()) if lengths.size else 0
    return [
        Bin(low_tokens=1 << place, num_documents=int(documents[place]), num_tokens=int(tokens[place]))
        for place in range(first, documents.size)
    ]


def _counts_table(manifests: dict[Path, Manifest], lengths: dict[Path, Lengths]) -> Table:
    columns = ("documents", "tokens", "share", "mean", "median", "longest", "held out")
    table = _table(("source", *columns), title="Documents and tokens")
    total = sum(int(own.sum(dtype=np.int64)) for own in lengths.values())
    for folder, manifest in manifests.items():
        own = lengths[folder]
        num_tokens = int(own.sum(dtype=np.int64))
        figures = [f"{num_tokens / own.size:,.1f}", f"{np.median(own):,.0f}", f"{own.max():,}"]
        held_out = manifest.num_tokens("validation") / num_tokens
        table.add_row(Text(str(folder)), *_counts(own.size, num_tokens, total), *figures, f"{held_out:.1%}")
        for source in manifest.sources or []:
            table.add_row(Text(f"  {shown(source.name)}"), *_counts(source.num_documents, source.num_tokens, total))
        table.add_section()
    return table


def _counts(num_documents: int, num_tokens: int, total: int) -> list[str]:
    return [f"{num_documents:,}", f"{num_tokens:,}", f"{num_tokens / total:.1%}"]


def _histogram_table(folder: Path, bins: list[Bin]) -> Table:
    title = Text(f"Lengths of documents in {folder}")
    table = _table(("length in tokens", "documents", "share of tokens"), title=title)
    table.add_column("", no_wrap=True)
    total = sum(one.num_tokens for one in bins)
    most = max(one.num_documents for one in bins)
    for one in bins:
        bar = "█" * round(BAR_WIDTH * one.num_documents / most) or ("▏" if one.num_documents else "")
        table.add_row(one.label, f"{one.num_documents:,}", f"{one.num_tokens / total:.1%}", bar)
    return table


def _table(columns: tuple[str, ...], *, title: str | Text) -> Table:
    table = Table(title=title, title_justify="left", box=HORIZONTALS, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=bool(number), overflow="fold")
    return table


def _draw(lengths: dict[Path, Lengths], picture: Path) -> None:
    """Draw a step line per folder: share of its tokens over document length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for folder, own in lengths.items():
        bins = bins_of(own)
        total = sum(one.num_tokens for one in bins)
        edges = [*(one.low_tokens for one in bins), 2 * bins[-1].low_tokens]
        axes.stairs([one.num_tokens / total for one in bins], edges, fill=True, alpha=0.4, label=label_of(str(folder)))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length of the document (tokens)")
    axes.set_ylabel("share of tokens")
    axes.set_title("Where the tokens are")
    axes.legend()
    save_picture(figure, picture, "--picture")
    say(f"picture: {picture}")
