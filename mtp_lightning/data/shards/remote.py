"""Files behind URLs: whatever fsspec can open, read from front to back."""

import hashlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from mtp_lightning.data.shards.index import INDEX_NAME, MOST_INDEX_BYTES
from mtp_lightning.data.shards.manifest import MANIFEST_NAME, MOST_MANIFEST_BYTES
from mtp_lightning.errors import DataError, refusal_of
from mtp_lightning.files.lock import wait_for_lock
from mtp_lightning.files.untrusted import shown

BLOCK_BYTES = 8 << 20
TRIES = 3
PAUSE_S = 0.5  # before the second try, and twice as long before each further one
DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}


def blocks_of(url: str, *, most_bytes: int) -> Iterator[bytes]:
    """Yield the content of a file, of at most so many bytes.

    Raises:
        DataError: It cannot be read, or is larger: a server that says so is asked for nothing, another for a byte more.
    """
    with opened(url) as file:
        said_bytes = getattr(file, "size", None)  # of most of fsspec's files, where the server says it
        if isinstance(said_bytes, int) and said_bytes > most_bytes:
            raise _too_large(url, most_bytes, f"{said_bytes:,} bytes")
        left_bytes = most_bytes
        while block := file.read(min(BLOCK_BYTES, left_bytes + 1)):
            left_bytes -= len(block)
            if left_bytes < 0:
                raise _too_large(url, most_bytes, f"{most_bytes - left_bytes:,} bytes received, and no end")
            yield block


@contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """Open a file to be read from front to back.

    Raises:
        DataError: It cannot be read, also while the body runs.
    """
    with _named(url), fsspec.open(url, "rb") as file:
        yield file


def tried_again(work: Any, *arguments: Any) -> Any:
    """Do something that may fail for reasons that pass, up to three times.

    Raises:
        DataError: The last try failed.
    """
    for number in range(TRIES - 1):
        try:
            return work(*arguments)
        except DataError:
            time.sleep(PAUSE_S * 2**number)
    return work(*arguments)


def mirror_folder(url: str, cache: Path) -> Path:
    """Return where manifest and index of shards behind a URL are kept."""
    return cache / "remote" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def mirror(url: str, cache: Path) -> Path:
    """Fetch manifest and index of shards behind a URL, and return the folder that has them now.

    Raises:
        DataError: They cannot be read, or not be written.
    """
    folder = mirror_folder(url, cache)
    most = {INDEX_NAME: MOST_INDEX_BYTES, MANIFEST_NAME: MOST_MANIFEST_BYTES}
    contents = {name: tried_again(_content, f"{url.rstrip('/')}/{name}", bound) for name, bound in most.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            wait_for_lock(lock)
            for name, content in contents.items():  # each belongs to the other by a fingerprint
                unfinished = folder / f"{name}.partial"
                unfinished.write_bytes(content)
                unfinished.replace(folder / name)
    except OSError as error:
        raise DataError(
            f"the index of {url} must be kept in {folder}",
            refusal_of(error, folder),
            "Make room there, or set run.cache",
        ) from error
    return folder


def _content(url: str, most_bytes: int) -> bytes:
    content = io.BytesIO()
    content.writelines(blocks_of(url, most_bytes=most_bytes))
    return content.getvalue()


def _too_large(url: str, most_bytes: int, found: str) -> DataError:
    return DataError(
        f"{url} must have at most {most_bytes:,} bytes",
        found,
        "Correct the address, or upload the shards again from their source: what is there is not what was built",
    )


@contextmanager
def _named(url: str) -> Iterator[None]:
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except ImportError as error:
        driver = DRIVERS.get(url.partition("://")[0], "the package that it names")
        hint = f"Install it: pip install {driver}"
        raise DataError(f"{url} must be readable by fsspec", shown(error), hint) from error
    except Exception as error:  # each of fsspec's drivers has exceptions of its own
        raise DataError(
            f"{url} must be readable",
            f"{type(error).__name__}: {shown(error)}",
            "Correct the address, see to access and network, or copy the shards to a folder",
        ) from error
