"""What a frozen trunk makes of rows, kept in files: a row that is read again costs a read instead of a forward.

A folder holds the states of one trunk, by a digest of all that decides them (`trunk_digest`); in it each process that
adds rows has a file of its own, to which it appends records, and reads those of all others:

    | digest of the row's tokens, 16 bytes | CRC-32 of the states, 4 | states (T, D), as they were computed |

What a killed process has left of its last record is not as long as a record, or has another checksum: it is not read.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from mtp_lightning.console.progress import say
from mtp_lightning.errors import TrainingError, refusal_of
from mtp_lightning.model.mtp_model import MtpModel, Whole
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import Recipe

SUFFIX = ".states"
KEY_BYTES, HEADER_BYTES = 16, 20
MOST_APART = 0.02  # relative distance of states that one trunk has computed of one row, in bf16 on whatever machine


def trunk_digest(model: MtpModel, recipe: Recipe, whole: Whole) -> str:
    """Name all that decides the bits of a trunk's states but the tokens; `whole` gathers sharded parameters."""
    device = next(model.trunk.parameters()).device.type
    how = [device, torch.__version__, recipe.run.precision, recipe.strategy.kind, recipe.memory.compile]
    shape = [recipe.data.seq_len, recipe.batch.micro_batch_size, recipe.data.document_mask]
    digest = hashlib.sha256(f"states 1 {how} {shape} {recipe.model.model_dump_json()}".encode())
    for name, parameter in model.trunk.named_parameters():
        with whole([parameter]):
            digest.update(f"{name} {parameter.dtype}".encode())
            digest.update(_bytes_of(parameter.detach()))
    return digest.hexdigest()[:KEY_BYTES]


@final
class KeptStates:
    """The last states of a frozen trunk by row."""

    def __init__(self, folder: Path, ranks: Ranks, num_rows: int) -> None:
        """Take the folder of one trunk, the ranks that train, and how many rows they will read, over all of them."""
        self.folder, self._ranks, self._num_rows = folder, ranks, num_rows
        self._places: dict[bytes, tuple[Path, int]] = {}  # digest of a row -> file, place of the record in it
        self._known: dict[Path, int] = {}  # bytes of each file whose records have been found
        self._own = folder / f"{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}{SUFFIX}"
        self._like: Tensor | None = None  # (T, D): what one row's states look like

    def __len__(self) -> int:
        """Return how many rows are known to be there."""
        return len(self._places)

    def states(self, inputs: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Return the states of rows: all that the trunk reads of them, (B, ...) integers -> (B, T, D).

        Computed where a row is missing, for all ranks together, since ranks may hold a part of the trunk each. The
        first rows of a process are always computed: kept ones must be equal to them.

        Raises:
            TrainingError: Nothing can be written, there is too little room, or other states are kept.
        """
        keys = [hashlib.blake2b(_bytes_of(row), digest_size=KEY_BYTES).digest() for row in inputs.cpu()]
        kept = self._kept(keys)
        if self._ranks.any(kept.keys() != set(keys)):
            computed = compute()
            with self._ranks.raise_on_all_ranks():
                try:
                    self._take(dict(zip(keys, computed.detach(), strict=True)))
                except OSError as error:
                    raise TrainingError(
                        f"the trunk's states must be written to {self.folder}",
                        refusal_of(error, self.folder),
                        "Make room or repair access, or set memory.cache_hidden_states to another folder, or to null",
                    ) from error
            return computed
        return torch.stack([kept[key] for key in keys]).to(inputs.device)

    def _kept(self, keys: list[bytes]) -> dict[bytes, Tensor]:
        if self._like is None:
            return {}
        if not self._places.keys() >= set(keys):
            self._look()
        found = {key: self._read(key) for key in keys if key in self._places}
        return {key: states for key, states in found.items() if states is not None}

    def _take(self, rows: dict[bytes, Tensor]) -> None:
        """Keep what is not kept yet; at first, open what is there and compare it with what has been computed."""
        if self._like is None:
            self._open(next(iter(rows.values())))
            for key, states in rows.items():
                self._compare(states, self._read(key) if key in self._places else None)
        for key, states in rows.items():
            if key not in self._places:
                self._append(key, _bytes_of(states))

    def _open(self, like: Tensor) -> None:
        self._like = torch.empty_like(like, device="cpu")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._look()
        missing = max(0, self._num_rows - len(self)) * self._record_bytes
        if (free := shutil.disk_usage(self.folder).free) < missing:
            raise OSError(f"{free / 2**20:,.1f} MiB free where {missing / 2**20:,.1f} MiB may be needed")
        if self._ranks.is_first:
            say(f"states of {len(self):,} rows are kept in {self.folder}; {missing / 2**30:,.2f} GiB may be added")

    def _compare(self, computed: Tensor, kept: Tensor | None) -> None:
        if kept is None:
            return
        distance = (computed.cpu().double() - kept.double()).norm() / computed.double().norm().clamp(min=1e-30).cpu()
        if not distance <= MOST_APART:
            raise TrainingError(
                "states that are kept must be those that the trunk computes",
                f"others, {float(distance):.1%} apart, in {self.folder}",
                "They come from another version of the program: remove that folder",
            )

    @property
    def _record_bytes(self) -> int:
        assert self._like is not None
        return HEADER_BYTES + self._like.nbytes

    def _look(self) -> None:
        """Find the records that have been added by any process."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            known, size = self._known.get(path, 0), path.stat().st_size
            if size < known + self._record_bytes:
                continue
            with path.open("rb", buffering=0) as file:
                for start in range(known, size - self._record_bytes + 1, self._record_bytes):
                    self._places[os.pread(file.fileno(), KEY_BYTES, start)] = (path, start)
                    self._known[path] = start + self._record_bytes

    def _read(self, key: bytes) -> Tensor | None:
        """Read a row's states; None, and forget it, where they are not whole."""
        path, start = self._places[key]
        assert self._like is not None
        states, header = torch.empty_like(self._like), bytearray(HEADER_BYTES)
        content = _bytes_of(states)
        with path.open("rb", buffering=0) as file:
            num_read = os.preadv(file.fileno(), [header, content], start)
        if num_read < self._record_bytes or header != _header(key, content):
            del self._places[key]
            return None
        return states

    def _append(self, key: bytes, content: memoryview) -> None:
        with self._own.open("ab") as file:
            file.write(_header(key, content))
            file.write(content)


def _header(key: bytes, content: memoryview) -> bytes:
    return key + zlib.crc32(content).to_bytes(HEADER_BYTES - KEY_BYTES, "little")


def _bytes_of(tensor: Tensor) -> memoryview:
    """See a tensor's memory, or that of a copy on the host, as bytes."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
