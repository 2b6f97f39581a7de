"""Which files of a folder hold tokens, in which of the known formats."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from mtp_lightning.data.adopted import litdata, megatron, npy
from mtp_lightning.data.adopted.token_file import TokenFile
from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import shown

Layout = Literal["megatron", "litdata", "npy"]
PATTERNS: dict[Layout, str] = {"megatron": "*.idx", "litdata": litdata.INDEX_NAME, "npy": "*.npy"}
MASKS = ("*label*mask*.npy", "*loss*mask*.npy")


@dataclass(frozen=True)
class Found:
    """The files that list or hold tokens, below one folder."""

    root: Path
    layout: Layout
    paths: list[Path]

    def name_of(self, path: Path) -> str:
        """Return the path of a file below the folder."""
        return path.relative_to(self.root).as_posix()


def find(path: Path, layout: Layout | None) -> Found:
    """Find the files of a folder, or that a file or a prefix of Megatron's names; their format unless it is given.

    Raises:
        DataError: There are none, of more than one format, or some that hold no tokens.
    """
    path = path.absolute()
    if path.is_dir():
        kinds = {kind: pattern for kind, pattern in PATTERNS.items() if layout in (None, kind)}
        found = {kind: sorted(filter(Path.is_file, path.rglob(pattern))) for kind, pattern in kinds.items()}
        found = {kind: files for kind, files in found.items() if files}
        root = path
    else:
        found, root = _named(path, layout), path.parent
    if len(found) != 1:
        names = [shown(files[0].relative_to(root)) for files in found.values()]
        raise DataError(
            f"{path} must hold tokens in one format: "
            + ", ".join(f"{kind} ({pattern})" for kind, pattern in PATTERNS.items()),
            f"{' and '.join(names)}" if names else "a folder without such files" if path.is_dir() else "no such file",
            "Name one with --format" if names else "Correct the path, or --format",
        )
    ((kind, files),) = found.items()
    mask = next((file for file in files if any(fnmatchcase(file.name, pattern) for pattern in MASKS)), None)
    if mask is not None:
        raise DataError(
            f"every .npy file of {path} must hold tokens",
            f"by its name a mask: {shown(mask.relative_to(root))}",
            "Move masks to another folder: they are not read, and all tokens would be targets",
        )
    return Found(root.resolve(), kind, [root.resolve() / file.relative_to(root) for file in files])


def token_files(found: Found, *, dtype: str | None, vocab_size: int) -> Iterator[TokenFile]:
    """Yield the files of tokens, in the order in which they are read.

    Raises:
        DataError: One is not what its format says.
    """
    open_file: Callable[[Path], Iterator[TokenFile]] = {
        "megatron": megatron.megatron_files,
        "litdata": litdata.litdata_files,
        "npy": lambda path: npy.npy_files(path, dtype=dtype, vocab_size=vocab_size),
    }[found.layout]
    for path in found.paths:
        yield from open_file(path)


def _named(path: Path, layout: Layout | None) -> dict[Layout, list[Path]]:
    """Return the file that is named, under its format; a raw file of tokens may have any name."""
    index = path if path.suffix == ".idx" else path.with_suffix(".idx") if path.suffix == ".bin" else None
    index = index or path.with_name(f"{path.name}.idx")
    if layout in (None, "megatron") and index.is_file():
        return {"megatron": [index]}
    if not path.is_file():
        return {}
    if layout in (None, "litdata") and path.name == litdata.INDEX_NAME:
        return {"litdata": [path]}
    return {"npy": [path]} if layout == "npy" or (layout is None and path.suffix == ".npy") else {}
