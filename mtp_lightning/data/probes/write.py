"""The folder of a synthetic task: train.jsonl, test.jsonl and, where words are its tokens, tokenizer.json."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtp_lightning.console.progress import counted
from mtp_lightning.errors import DataError
from mtp_lightning.files.atomic_folder import atomic_folder, check_new_folder
from mtp_lightning.files.durable import durable_file, write_durably

TRAIN, TEST, TOKENIZER = "train.jsonl", "test.jsonl", "tokenizer.json"


Rows = tuple[int, Iterable[Mapping[str, Any]]]
"""How many, and the rows."""


def write_probe(out: Path, *, train: Rows, test: Rows, tokenizer: bytes | None = None) -> None:
    """Write the new folder `out`, which appears when it is complete.

    Raises:
        DataError: There is something, or it cannot be written.
    """
    check_new_folder(out, DataError)
    with atomic_folder(out, DataError) as staging:
        for name, (count, rows) in ((TRAIN, train), (TEST, test)):
            with durable_file(staging / name) as file, counted(f"Writing {name}", total=count, unit="rows") as advance:
                for row in rows:
                    file.write(json.dumps(row).encode() + b"\n")
                    advance(1)
        if tokenizer is not None:
            write_durably(staging / TOKENIZER, tokenizer)
