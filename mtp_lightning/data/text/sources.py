"""Where documents come from: files, folders, globs, and the Python standard library's own source."""

import contextlib
import functools
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from mtp_lightning.errors import DataError
from mtp_lightning.files.paths import expanded, leads_to, remedy_for
from mtp_lightning.files.untrusted import shown

STDLIB = "stdlib"
# Not the library: installed packages, its tests (larger than all the rest), what the build of this Python left.
STDLIB_LEFT_OUT = re.compile(r"(site|dist)-packages|tests?|idle_test|__pycache__|config-.*|_sysconfigdata.*")
STDLIB_GENERATED = (
    "encodings/",
    "pydoc_data/",
)  # tables and manual pages; one file of prose outweighs all else held out
WILDCARDS = "*?["
METADATA = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-\w+\.arrow")
"""What Hugging Face's `datasets` writes beside its tables of Arrow's."""

WHOLE = ("dataset_dict.json", "dataset_infos.json")  # also without such a table beside them
COMPRESSED_ENDINGS = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a corpus."""

    path: Path
    name: str  # path relative to its source: decides order and split, so it must not depend on the machine
    num_bytes: int
    changed_at_ns: int
    is_named: bool  # by the user, and not only met in a folder
    source: int = 0  # number of the source that it was found in

    @property
    def is_compressed(self) -> bool:
        """Whether its name says so."""
        return self.name.lower().endswith(COMPRESSED_ENDINGS)

    @property
    def format(self) -> str:
        """The ending that says how it is read, in small letters, without that of a compression."""
        endings = self.name.rpartition("/")[2].lower().split(".")[1:]
        if self.is_compressed:
            endings.pop()
        return f".{endings[-1]}" if endings else ""


def find_files(sources: list[str], passed_over: Counter[str] | None = None) -> list[SourceFile]:
    """Return the files of all sources: in the order of the sources, by name within one, each file once.

    What is found and not taken is counted by kind in `passed_over`.

    A folder means every file below it that is not hidden (links to folders are not followed); a glob means the
    files that it matches and the files below the folders that it matches; `stdlib` means every `.py` of the
    running Python's standard library but its tests, generated tables and installed packages (10 MB in Python
    3.11); `stdlib:NAME` means one module or package of it.

    Raises:
        DataError: A source names nothing, cannot be looked up, or nothing is left of it.
    """
    files: dict[Path, SourceFile] = {}
    for number, source in enumerate(sources):
        for file in sorted(_readable_files_of(source, passed_over), key=lambda file: file.name):
            files.setdefault(file.path.resolve(), replace(file, source=number))
    return list(files.values())


def is_stdlib(source: str) -> bool:
    """Tell whether a source is a keyword for the standard library, and not a path."""
    return source == STDLIB or source.startswith(f"{STDLIB}:")


def matches_of(source: str) -> list[Path]:
    """Return what a path or a pattern itself names: files, and folders whether or not there is a file in them."""
    path = Path(expanded(source))
    return [path] if leads_to(path) or not _is_pattern(source) else _matches(path)[1]


def _readable_files_of(source: str, passed_over: Counter[str] | None) -> list[SourceFile]:
    """Find the files of a source, whatever its name is."""
    others = Counter[str]()
    try:
        files = _files_of(source, others)
    except (OSError, ValueError, RuntimeError) as error:  # the system's; of names that it cannot have; of ~NAME
        raise DataError(
            "every entry of data.corpus must be a path that can be read",
            f"{shown(repr(source))}: {error}",
            "Correct the path, or see to the rights of reading",
        ) from error
    if not files:
        raise DataError(
            "every entry of data.corpus must yield at least one file",
            f"{source!r}, which yields none in {str(Path.cwd())!r}" + (f", but {spelled(others)}" if others else ""),
            "Correct the path or pattern; hidden files are not taken",
        )
    if passed_over is not None:
        passed_over.update(others)
    return files


def spelled(counts: Counter[str]) -> str:
    """Return counts of kinds as a phrase.

    >>> spelled(Counter(binary=2, empty=1))
    '2 binary, 1 empty'
    """
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())


def _files_of(source: str, passed_over: Counter[str]) -> list[SourceFile]:
    if is_stdlib(source):
        return _files_of_stdlib(source)
    path = Path(expanded(source))
    if source.strip() and (remedy := remedy_for(str(path))):
        raise DataError("every entry of data.corpus must be a path or a pattern on this machine", repr(source), remedy)
    if not source.strip() or (not leads_to(path) and not _is_pattern(source)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # for all else that the system may say
        raise DataError(
            "every entry of data.corpus must exist",
            f"no file or folder {str(path.absolute())!r}" if source.strip() else f"the name {source!r}",
            f"Correct the path, or use {STDLIB!r} for the Python standard library's source",
        )
    if path.is_file():
        return [_source_file(path, path.parent, is_named=True)]
    if path.is_dir():
        return _files_below(path, path, passed_over, left_out=_is_passed_over)
    if path.exists():
        raise DataError(
            "every entry of data.corpus must be a file, a folder or a pattern",
            f"{str(path)!r}, which is a pipe, a socket or a device",
            "Write what comes from it into a file first",
        )
    return _files_of_glob(path, passed_over)


def _is_pattern(source: str) -> bool:
    return any(mark in source for mark in WILDCARDS)


def _matches(pattern: Path) -> tuple[Path, list[Path]]:
    """Return the plain beginning of a pattern, and what it matches there."""
    parts = pattern.parts
    num_plain = next(i for i, part in enumerate(parts) if _is_pattern(part))
    root = Path(*parts[:num_plain])
    try:
        found = list(root.glob(str(Path(*parts[num_plain:]))))
    except (ValueError, OSError) as error:
        raise DataError(
            "a pattern of data.corpus or data.stream must be one of names that can be looked up",
            f"{str(pattern)!r}: {error}",
            "Correct the pattern; ** stands alone between slashes",
        ) from error
    return root, [path for path in found if not any(map(_is_passed_over, path.relative_to(root).parts))]


def _files_of_glob(pattern: Path, passed_over: Counter[str]) -> list[SourceFile]:
    root, matches = _matches(pattern)
    files = []
    for path in matches:
        if path.is_dir():
            files += _files_below(path, root, passed_over, left_out=_is_passed_over)
        elif not path.exists():
            raise DataError(
                "what a pattern of data.corpus or data.stream matches must exist",
                f"{str(path)!r}, a link to nothing",
                "Remove it, or correct the pattern",
            )
        elif kind := _other_kind(path):
            passed_over[kind] += 1
        else:
            files.append(_source_file(path, root, is_named=False))
    return files


def _files_below(
    folder: Path, root: Path, passed_over: Counter[str], *, left_out: Callable[[str], bool]
) -> list[SourceFile]:
    files = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        passed_over["hidden"] += sum(map(_is_passed_over, folders + names))
        folders[:] = [name for name in folders if not left_out(name)]
        passed_over["links to folders"] += sum(Path(parent, name).is_symlink() for name in folders)
        for path in (Path(parent, name) for name in names if not left_out(name)):
            if kind := _other_kind(path):
                passed_over[kind] += 1
            else:
                files.append(_source_file(path, root, is_named=False))
    passed_over -= Counter()  # forgets zeros
    return files


def _raise(error: OSError) -> None:
    raise error


def _other_kind(path: Path) -> str | None:
    """Name what is no file of documents."""
    if not path.is_file():
        return "links to nothing" if path.is_symlink() else "pipes, sockets or devices"
    if METADATA.fullmatch(path.name) and (path.name in WHOLE or any(path.parent.glob("*.arrow"))):
        return "files of datasets' own beside its tables"
    return None


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _is_not_library(name: str) -> bool:
    return _is_passed_over(name) or STDLIB_LEFT_OUT.fullmatch(name.removesuffix(".py")) is not None


def _files_of_stdlib(source: str) -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _library_below(root)
    if source == STDLIB:
        wanted = [file for file in files if not file.name.startswith(STDLIB_GENERATED)]
    else:
        inside = source.removeprefix(f"{STDLIB}:").replace(".", "/")
        wanted = [file for file in files if file.name == f"{inside}.py" or file.name.startswith(f"{inside}/")]
    if not wanted:
        modules = {file.name.removesuffix(".py").split("/")[0] for file in files}
        near = get_close_matches(source.removeprefix(f"{STDLIB}:"), sorted(modules), n=3)
        raise DataError(
            f"{source!r} in data.corpus must name a part of the standard library that is written in Python",
            f"no such source below {root}",
            "Nearest are: " + ", ".join(f"{STDLIB}:{name}" for name in near or ["json", "email"]),
        )
    return wanted


@functools.cache
def _library_below(root: Path) -> tuple[SourceFile, ...]:
    below = _files_below(root, root, Counter(), left_out=_is_not_library)
    return tuple(file for file in below if file.name.endswith(".py"))


def _source_file(path: Path, root: Path, *, is_named: bool) -> SourceFile:
    name = path.relative_to(root).as_posix()
    stat = path.stat()
    return SourceFile(path=path, name=name, num_bytes=stat.st_size, changed_at_ns=stat.st_mtime_ns, is_named=is_named)
