"""Texts that have been appended are there again, whatever became of the one that was being written."""

import os
from pathlib import Path

import pytest

from mtp_lightning.data.generated.log import LOG_NAME, TextLog, Texts, check_request
from mtp_lightning.errors import DataError
from mtp_lightning.evaluation.code.samples import SAMPLE, LineLog

BATCHES: list[Texts] = [[[1, 2, 3], [4]], [[70_000], [5, 6]], [[7] * 20]]
REQUEST = {"--seed": 3, "--top-k": None, "MODEL": "step-00000001 of sha256 abc"}


def written(folder: Path, batches: list[Texts]) -> list[int]:
    """Append batches; return how long the file was after each, the empty one first."""
    folder.mkdir(exist_ok=True)
    path = folder / LOG_NAME
    with TextLog(folder, REQUEST) as log:
        ends = [path.stat().st_size]
        for batch in batches:
            log.append(batch)
            ends.append(path.stat().st_size)
    return ends


def replayed(log: TextLog) -> list[Texts]:
    """Take back batches until one is not whole."""
    found = []
    for batch in BATCHES:
        if (texts := log.replay(len(batch))) is None:
            break
        found.append(texts)
    return found


def folder_with(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / LOG_NAME).write_bytes(content)
    return folder


def test_what_was_appended_is_replayed_and_can_be_added_to(tmp_path: Path) -> None:
    written(tmp_path, BATCHES[:2])
    with TextLog(tmp_path, REQUEST) as log:
        assert log.num_texts == 4
        assert replayed(log) == BATCHES[:2]
        log.append(BATCHES[2])
        assert log.num_texts == 5
    with TextLog(tmp_path, REQUEST) as log:
        assert replayed(log) == BATCHES
    assert len((tmp_path / LOG_NAME).read_text().splitlines()) == 1 + 5


def test_a_batch_that_was_cut_anywhere_is_left_out_and_written_over(tmp_path: Path) -> None:
    ends = written(tmp_path / "whole", BATCHES)
    content = (tmp_path / "whole" / LOG_NAME).read_bytes()
    for cut in range(len(content)):
        folder = folder_with(tmp_path / f"cut_{cut}", content[:cut])
        num_whole = max(sum(end <= cut for end in ends) - 1, 0)
        with TextLog(folder, REQUEST) as log:
            assert replayed(log) == BATCHES[:num_whole]
            for batch in BATCHES[num_whole:]:
                log.append(batch)
            assert log.num_texts == 5
        assert (folder / LOG_NAME).read_bytes() == content


@pytest.mark.parametrize("tail", [b"\0" * 5, b"\0" * 400, b"\xff" * 400, b"[1]\n", b'{"tokens": [1]}\n' * 2, b"\n\n"])
def test_what_a_disk_left_behind_the_last_text_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    (end,) = written(tmp_path, BATCHES)[-1:]
    with (tmp_path / LOG_NAME).open("ab") as file:
        file.write(tail)
    with TextLog(tmp_path, REQUEST) as log:
        assert replayed(log) == BATCHES
    assert (tmp_path / LOG_NAME).stat().st_size == end


def test_a_changed_byte_in_any_place_is_noticed(tmp_path: Path) -> None:
    ends = written(tmp_path / "whole", BATCHES)
    content = (tmp_path / "whole" / LOG_NAME).read_bytes()
    for place in range(ends[1], ends[2]):
        damaged = bytearray(content)
        damaged[place] ^= 1
        with TextLog(folder_with(tmp_path / "damaged", bytes(damaged)), REQUEST) as log:
            assert replayed(log) == BATCHES[:1]


def test_a_changed_byte_in_the_request_is_refused(tmp_path: Path) -> None:
    (end, *_) = written(tmp_path / "whole", BATCHES)
    content = (tmp_path / "whole" / LOG_NAME).read_bytes()
    for place in range(end):
        damaged = bytearray(content)
        damaged[place] ^= 1
        folder = folder_with(tmp_path / "damaged", bytes(damaged))
        with pytest.raises(DataError, match=rf"{LOG_NAME} must be as it was written.*Remove .* to begin anew"):
            check_request(folder, REQUEST)


def test_another_request_is_refused_by_name(tmp_path: Path) -> None:
    written(tmp_path, BATCHES)
    with pytest.raises(DataError, match=r"found --seed 4, begun with 3; --rows 2, begun with not given\. Give those"):
        TextLog(tmp_path, {**REQUEST, "--seed": 4, "--rows": 2})


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_logs_are_for_whom_the_umask_leaves_them(tmp_path, umask):
    """A group that shares a folder goes on with what one of it has begun."""
    former = os.umask(umask)
    try:
        with TextLog(tmp_path, REQUEST), LineLog(tmp_path / "samples.jsonl", SAMPLE):
            pass
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
