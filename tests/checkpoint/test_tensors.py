import io
import json
import os
import resource
import tracemalloc
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.checkpoint.format.tensors import NAME_OF_DTYPE, read_header, read_tensor, read_tensors, write_tensors
from tests.checkpoint.savers import forkserver


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with path.open("wb") as file:
        write_tensors(file, tensors)


def one_of_each_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(48, dtype=torch.uint8) % 2
    return {str(dtype): raw.view(dtype).reshape(2, -1) for dtype in NAME_OF_DTYPE}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = one_of_each_dtype() | {"scalar": torch.tensor(3), "empty": torch.empty(0, 2)}
    write(tmp_path / "x", tensors)
    read = safetensors.torch.load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_tensors_far_into_a_large_file_are_read(tmp_path: Path) -> None:
    """A file of 3 TB, nearly all of it a hole."""
    far = 3_000_000_000_000
    header = {
        "first": {"dtype": "U8", "shape": [far // 1000, 1000], "data_offsets": [0, far]},
        "last": {"dtype": "I32", "shape": [2], "data_offsets": [far, far + 8]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "x").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(far, os.SEEK_CUR)
        file.write(memoryview(torch.tensor([5, 7], dtype=torch.int32).numpy()).cast("B"))
    entries = read_header(tmp_path / "x").entries
    assert read_tensor(tmp_path / "x", entries["last"]).tolist() == [5, 7]


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in one_of_each_dtype().items()}
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    read = read_tensors(tmp_path / "x")
    assert all(torch.equal(read[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.arange(1000)})
    read = read_tensors(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"")
    assert torch.equal(read["a"], torch.arange(1000))


@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 30, 200, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, kept_bytes: int) -> None:
    write(tmp_path / "x", {"a": torch.arange(1000), "b": torch.ones(3)})
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:kept_bytes])
    with pytest.raises(DamagedCheckpointError, match=str(tmp_path / "x")):
        read_tensors(tmp_path / "x")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def crafted(path: Path, header: object) -> Path:
    """Write a file of 16 bytes of values under a header of any kind."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    return path


def test_a_crafted_file_is_read_if_it_is_right(tmp_path: Path) -> None:
    entries = {"b": ENTRY | {"data_offsets": [8, 16]}, "none": ENTRY | {"shape": [0, 5], "data_offsets": [8, 8]}}
    read = read_tensors(crafted(tmp_path / "x", entries | {"a": ENTRY, "__metadata__": None}))
    assert {name: tensor.shape for name, tensor in read.items()} == {"a": (2,), "none": (0, 5), "b": (2,)}


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ({"a": ENTRY | {"data_offsets": [0, 10**12]}}, "for shape"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, "whole numbers"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "for shape"),
        ({"a": ENTRY | {"data_offsets": [0, 4]}}, "for shape"),
        ({"a": ENTRY | {"data_offsets": [0.0, 8.0]}}, "whole numbers"),
        ({"a": ENTRY | {"data_offsets": [False, 8]}}, "whole numbers"),
        ({"a": ENTRY | {"data_offsets": [0, 8, 16]}}, "whole numbers"),
        ({"a": ENTRY | {"data_offsets": "08"}}, "whole numbers"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, "'b' and 'a' in the same bytes"),
        ({"a": ENTRY, "b": ENTRY}, "in the same bytes"),
        ({"a": ENTRY | {"shape": [10**11]}}, "for shape"),
        ({"a": ENTRY | {"shape": [2**62, 2**62]}}, "whole numbers"),
        ({"a": ENTRY | {"shape": [0, 2**70], "data_offsets": [0, 0]}}, "whole numbers"),
        ({"a": ENTRY | {"shape": [1] * 100 + [2]}}, "whole numbers"),
        ({"a": ENTRY | {"shape": [-1, -2]}}, "whole numbers"),
        ({"a": ENTRY | {"shape": ["x" * 1000, 10**10]}}, "whole numbers"),
        ({"a": ENTRY | {"shape": 2}}, "whole numbers"),
        ({"a": ENTRY | {"dtype": "F4"}}, "'a' of the dtype 'F4'"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "of the dtype a list"),
        ({"\x1b[2J": {}}, "of the dtype null"),
        ({"a": []}, "of the dtype null"),
        ({"a": ENTRY, "__metadata__": {"x": 1}}, "metadata"),
        ({"a": ENTRY, "__metadata__": [1]}, "metadata"),
        ([], "a list in place of a header"),
        (b'{"a": 1, "a": 2}', "1 names given again"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "1 names given again"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "header that cannot be read"),
        (b"\xff{}", "header that cannot be read"),
        (b"", "header that cannot be read"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_no_header_is_believed(tmp_path: Path, header: object, found: str) -> None:
    path = crafted(tmp_path / "x", header)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedCheckpointError) as failure:
            read_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert found in failure.value.found
    assert str(path) in failure.value.found
    assert failure.value.found.isprintable()


@pytest.mark.parametrize("header_bytes", [19, 10**6, 2**62, 2**64 - 1])
def test_no_length_of_a_header_is_believed(tmp_path: Path, header_bytes: int) -> None:
    (tmp_path / "x").write_bytes(header_bytes.to_bytes(8, "little") + b"{}" + bytes(16))
    with pytest.raises(DamagedCheckpointError, match=f"a header of {header_bytes:,} bytes at the beginning of 26"):
        read_tensors(tmp_path / "x")


def test_a_header_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)  # a hole: nothing on the disk
    with pytest.raises(DamagedCheckpointError, match=r"a header of 150,000,000 bytes"):
        read_tensors(tmp_path / "x")


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(DamagedCheckpointError, match="a FIFO"):
            read_tensors(path)


def _report_growth(pipe: Connection, tensor_mib: int, count: int) -> None:
    torch.set_num_threads(1)
    strided = {str(index): torch.ones(2, tensor_mib * 2**17).T for index in range(count)}  # float32, not contiguous
    write_tensors(open("/dev/null", "wb"), {"first": torch.ones(2, 2).T})  # noqa: SIM115, PTH123
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_tensors(open("/dev/null", "wb"), strided)  # noqa: SIM115, PTH123
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def test_writing_holds_one_tensor_at_a_time() -> None:
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_growth, args=(sender, 16, 8))
    process.start()
    assert receiver.poll(60)
    growth_mib = receiver.recv()
    process.join()
    assert growth_mib < 72, "a copy of one tensor takes 16 MiB (the C library may keep two more), of all 128"


def test_equal_content_gives_equal_bytes() -> None:
    tensors = one_of_each_dtype()
    first, second = io.BytesIO(), io.BytesIO()
    write_tensors(first, tensors)
    write_tensors(second, dict(reversed(tensors.items())))
    assert first.getvalue() == second.getvalue()


NO_TENSORS = {
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html>log in</html>", "accept the licence"),
    "a pickle of torch": (b"PK\x03\x04" + bytes(60), "real"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\1" * 60, "in place of the folder"),
    "a compressed file": (b"\x1f\x8b\x08\0" + b"\1" * 60, "Unpack"),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_what_was_downloaded_in_place_of_tensors_is_named(tmp_path: Path, kind: str) -> None:
    content, hint = NO_TENSORS[kind]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=rf"must be as it was written; found {kind}.*{hint}"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize("entries", [{"a": ENTRY}, {"a": ENTRY | {"data_offsets": [8, 16]}}, {}], ids=str)
def test_bytes_of_no_tensor_are_refused_as_by_the_library(tmp_path: Path, entries: dict[str, object]) -> None:
    path = crafted(tmp_path / "x", entries)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(path)
    with pytest.raises(DamagedCheckpointError, match=r"found (8|16) bytes of no tensor"):
        read_tensors(path)
