"""Shards from URLs on a disk of this node: whole, checked on arrival, shared by its ranks, within a bound.

Files are named after their content. A shard in use is locked (shared), one on its way is locked by who fetches it, so
the kernel forgets both when a process is killed. Making room is one process at a time; it removes what was used longest
ago and is not locked, partial files of killed processes included.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, final

from mtp_lightning.console.progress import lines_now_and_then
from mtp_lightning.data.shards.manifest import Shard
from mtp_lightning.data.shards.remote import blocks_of, tried_again
from mtp_lightning.errors import DataError, MtpError, refusal_of
from mtp_lightning.files.durable import force
from mtp_lightning.files.lock import is_file_at, try_lock, wait_for_lock

ROOM_WAIT_S = 600.0
POLL_S = 0.1
AHEAD_PAUSE_S = 1.0  # before what could not be fetched ahead is tried again
GIB = 2**30


@final
class ShardCache:
    """The shards behind one URL; caches of other URLs and other processes use the same folder and bound."""

    def __init__(self, url: str, folder: Path, *, limit_bytes: int) -> None:
        self.url = url.rstrip("/")
        self.limit_bytes = limit_bytes
        self._folder = folder
        self._ahead: SimpleQueue[Shard] | None = None
        self._wanted: list[str] = []  # fetched ahead or on their way

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None, "_wanted": []}

    def open(self, shard: Shard, free_own: Callable[[], None] = lambda: None) -> BinaryIO:
        """Return a shard's file, which stays while it is open; fetch it if it is not there.

        Args:
            shard: which.
            free_own: closes files that this process holds open and can open again; called when there is no room.

        Raises:
            DataError: It cannot be fetched, is not what its manifest says, or there is no room.
        """
        while True:
            file = self._held(shard)
            if file is not None:
                return file
            self._fetch(shard, free_own)

    def fetch_ahead(self, shards: Sequence[Shard]) -> None:
        """Begin to fetch shards that will be needed, in a thread; what fails is tried again when it is needed."""
        names = [shard.sha256 for shard in shards]
        if names == self._wanted:
            return
        new = [shard for shard in shards if shard.sha256 not in self._wanted]
        self._wanted = names
        if self._ahead is None:
            self._ahead = SimpleQueue()
            # A daemon: nobody waits for it when the process ends.
            Thread(target=self._fetch_from, args=(self._ahead,), daemon=True, name="mtp-shards").start()
        for shard in new:
            self._ahead.put(shard)

    def _fetch_from(self, shards: "SimpleQueue[Shard]") -> None:
        while True:
            shard = shards.get()
            while shard.sha256 in self._wanted and not self._path(shard).exists():
                try:
                    self._fetch(shard, lambda: None, waits=False)
                    break  # or another process fetches it
                except MtpError:
                    time.sleep(AHEAD_PAUSE_S)

    def _path(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}.tar"

    def _held(self, shard: Shard) -> BinaryIO | None:
        """Open a shard that is there and lock it against removal."""
        path = self._path(shard)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        wait_for_lock(file, shared=True)
        status = os.fstat(file.fileno())
        if status.st_nlink == 0 or status.st_size != shard.num_bytes:  # removed between the two; or cut short
            file.close()
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        return file

    def _fetch(self, shard: Shard, free_own: Callable[[], None], *, waits: bool = True) -> None:
        """Fetch a shard, unless another process does: then wait for it, or leave it alone."""
        partial = self._path(shard).with_suffix(".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                if waits:
                    wait_for_lock(file)
                elif not try_lock(file):
                    return
                if os.fstat(file.fileno()).st_nlink == 0:
                    return
                if not self._path(shard).exists():
                    self._arrive(shard, file, free_own, waits=waits)
                elif is_file_at(file, partial):  # nobody else's: it is locked here
                    partial.unlink()
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._full(shard, error) from error

    def _arrive(self, shard: Shard, file: BinaryIO, free_own: Callable[[], None], *, waits: bool) -> None:
        """Fill the partial file of a shard, which is locked here, and give it its name; else remove it."""
        partial = self._path(shard).with_suffix(".partial")
        try:
            self._make_room(shard, file, free_own, waits=waits)
            tried_again(self._download, shard, file)
            with self._alone():  # who counts meets it under one name
                if is_file_at(file, partial):  # without locks another process may have been quicker
                    partial.replace(self._path(shard))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _download(self, shard: Shard, file: BinaryIO) -> None:
        url = f"{self.url}/{shard.name}"
        say_progress = lines_now_and_then(f"fetching {url}", shard.num_bytes)
        digest = hashlib.sha256()
        file.seek(0)
        for block in blocks_of(url, most_bytes=shard.num_bytes):
            file.write(block)
            digest.update(block)
            say_progress(len(block))
        received_bytes = file.tell()
        file.truncate()
        file.flush()
        force(file.fileno())
        if (received_bytes, digest.hexdigest()) != (shard.num_bytes, shard.sha256):
            raise DataError(
                f"{url} must have {shard.num_bytes:,} bytes and sha256 {shard.sha256}, as its manifest says",
                f"{received_bytes:,} bytes and sha256 {digest.hexdigest()}",
                "Upload the shard again from its source, or build the shards again with `mtp data build`",
            )

    def _make_room(self, shard: Shard, partial: BinaryIO, free_own: Callable[[], None], *, waits: bool) -> None:
        """Reserve the room that a shard takes, by an empty file of its size."""
        until = time.monotonic() + (ROOM_WAIT_S if waits else 0)
        while True:
            with self._alone():
                in_use = self._remove_oldest(shard.num_bytes)
                if in_use + shard.num_bytes <= self.limit_bytes:
                    os.posix_fallocate(partial.fileno(), 0, shard.num_bytes)
                    return
            free_own()
            if time.monotonic() > until or shard.num_bytes > self.limit_bytes:
                raise DataError(
                    f"the cache {self._folder} must have room for {shard.num_bytes:,} bytes of {self.url}/{shard.name}",
                    f"{in_use:,} of {self.limit_bytes:,} bytes in use by running processes",
                    "Raise data.cache_gib, or lower data.shuffle_shards",
                )
            time.sleep(POLL_S)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as lock:
            wait_for_lock(lock)
            yield

    def _remove_oldest(self, needed_bytes: int) -> int:
        """Remove files that nobody uses until there is room, the oldest first; return the bytes that stay."""
        files = list(self._files())
        taken_bytes = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda entry: (entry[1].suffix == ".tar", entry[0].st_mtime_ns)):
            if taken_bytes + needed_bytes <= self.limit_bytes:
                break
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                if try_lock(file, without_locks=False):  # it may be in use
                    path.unlink(missing_ok=True)
                    taken_bytes -= stat.st_size
        return taken_bytes

    def _files(self) -> Iterator[tuple[os.stat_result, Path]]:
        for path in (*self._folder.glob("*.tar"), *self._folder.glob("*.partial")):
            with contextlib.suppress(FileNotFoundError):  # found to be damaged and removed in the meantime
                yield path.stat(), path

    def _full(self, shard: Shard, error: OSError) -> DataError:
        return DataError(
            f"{self._folder} must have room for {shard.num_bytes:,} bytes of {self.url}/{shard.name}",
            refusal_of(error, self._folder),
            "Make room, lower data.cache_gib, or set run.cache to a larger disk",
        )
