"""JSON that our tools write and read again: what stands in its place is refused in words, and waited for by nobody."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.format.manifest import MANIFEST_NAME, read_manifest
from mtp_lightning.checkpoint.format.state_tree import STATE_NAME, read_state, write_state
from mtp_lightning.decode.tree import read_tree
from mtp_lightning.errors import MtpError
from mtp_lightning.evaluation.kept_reports import MARGINAL, OF_PROBES
from mtp_lightning.training.logging import loggers
from mtp_lightning.training.phases import _summary_of
from mtp_lightning.training.step.skipped_steps import RECORDS, read_rollbacks

CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "a brace": b"{",
    "a number": b"5",
    "a text": b'"x"',
    "a list of lists": b"[[[]]]",
    "other fields": b'{"a": 1, "parents": [1e400], "ranks": [NaN]}',
    "fields of other types": b'{"parents": 5, "ranks": "x", "format_version": [], "wandb": 3}',
    "no UTF-8": b'{"\xff": 1}',
    "too deep": b"[" * 100_000,
    "too many digits": b'{"parents": ' + b"9" * 5000 + b"}",
    "escapes": b'{"\\u001b[2J": "\\ud800"}',
}
REPLACED: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    **{name: lambda path, content=content: path.write_bytes(content) for name, content in CONTENTS.items()},  # type: ignore[misc]
}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tree": ("tree.json", read_tree),
    "manifest of a checkpoint": (MANIFEST_NAME, lambda path: read_manifest(path.parent)),
    "state of a checkpoint": (STATE_NAME, lambda path: read_state(path.parent)),
    "rollbacks": (str(RECORDS), lambda path: read_rollbacks(path.parents[1])),
    "records of loggers": (loggers.RECORDS, lambda path: loggers._read_records(path.parent)),
    "summary of a phase": ("summary.json", lambda path: _summary_of(path.parent)),
    "marginalization": (MARGINAL.file_name, lambda path: MARGINAL.read(path.parent)),
    "probe": (OF_PROBES["induction"].file_name, lambda path: OF_PROBES["induction"].read(path.parent)),
}
TAKEN = {("summary of a phase", "other fields"), ("summary of a phase", "fields of other types")}
TAKEN |= {
    ("summary of a phase", "escapes"),
    *(("state of a checkpoint", odd) for odd in ("other fields", "fields of other types", "escapes")),
}
"""Objects of any fields are passed on."""


@pytest.mark.timeout(20)
@pytest.mark.parametrize("odd", REPLACED)
@pytest.mark.parametrize("reader", READERS)
def test_odd_files_are_refused_in_words(reader: str, odd: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    write_state(tmp_path, {"a": 1})
    (tmp_path / "logs").mkdir()
    (tmp_path / name).unlink(missing_ok=True)
    REPLACED[odd](tmp_path / name)
    if (reader, odd) in TAKEN:
        read(tmp_path / name)
        return
    with pytest.raises(MtpError) as caught:
        read(tmp_path / name)
    assert caught.value.found
    assert caught.value.hint
    assert str(caught.value).replace("\n", "").isprintable()
