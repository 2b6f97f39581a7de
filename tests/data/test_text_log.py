"""Texts that have been noted are there again, whatever became of the one that was being written."""

from pathlib import Path

import pytest

from mtp_lightning.data.generated.log import TextLog, Texts

BATCHES: list[Texts] = [[[1, 2, 3], [4]], [[70_000], [5, 6]], [[7] * 20]]


def written(path: Path, batches: list[Texts]) -> list[int]:
    """Note batches; return how long the file was after each, the empty one first."""
    with TextLog(path) as log:
        ends = [path.stat().st_size]
        for batch in batches:
            log.note(batch)
            ends.append(path.stat().st_size)
    return ends


def recalled(log: TextLog) -> list[Texts]:
    return list(iter(log.recall, None))


def test_what_was_noted_is_recalled_and_can_be_added_to(tmp_path: Path) -> None:
    written(tmp_path / "log", BATCHES[:2])
    with TextLog(tmp_path / "log") as log:
        assert log.num_texts == 4
        assert recalled(log) == BATCHES[:2]
        log.note(BATCHES[2])
        assert log.num_texts == 5
    with TextLog(tmp_path / "log") as log:
        assert recalled(log) == BATCHES


def test_a_batch_that_was_cut_anywhere_is_left_out_and_written_over(tmp_path: Path) -> None:
    ends = written(tmp_path / "whole", BATCHES)
    content = (tmp_path / "whole").read_bytes()
    for cut in range(len(content)):
        path = tmp_path / f"cut_{cut}"
        path.write_bytes(content[:cut])
        num_whole = sum(end <= cut for end in ends) - 1
        with TextLog(path) as log:
            assert recalled(log) == BATCHES[:num_whole]
            for batch in BATCHES[num_whole:]:
                log.note(batch)
        assert path.read_bytes() == content


@pytest.mark.parametrize("tail", [b"\0" * 5, b"\0" * 400, b"\xff" * 400, b"\x01\0\0\0\x01\0\0\0" + b"\0" * 12])
def test_what_a_disk_left_behind_the_last_batch_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    (end,) = written(tmp_path / "log", BATCHES)[-1:]
    with (tmp_path / "log").open("ab") as file:
        file.write(tail)
    with TextLog(tmp_path / "log") as log:
        assert recalled(log) == BATCHES
    assert (tmp_path / "log").stat().st_size == end


def test_a_changed_byte_in_any_place_is_noticed(tmp_path: Path) -> None:
    ends = written(tmp_path / "whole", BATCHES)
    content = (tmp_path / "whole").read_bytes()
    for place in range(ends[1], ends[2]):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "log").write_bytes(damaged)
        with TextLog(tmp_path / "log") as log:
            assert recalled(log) == BATCHES[:1]
