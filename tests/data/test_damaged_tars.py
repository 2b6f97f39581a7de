"""Tars in a stream: what is damaged is named with its place, and nothing healthy is stopped."""

import bz2
import gzip
import io
import lzma
import multiprocessing
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pytest

from mtp_lightning.data.loading.stream_documents import TarDocuments, tars_of
from mtp_lightning.data.shards import tar_members
from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.tar_members import TarDamage, members_of
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.errors import DataError
from tests.data.corpora import forge
from tests.data.test_streaming import build, write_tar

DOCUMENTS = {f"{number:02d}.txt": f"document {number} ".encode() * (90 * number) for number in range(7)}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK = 512


def tar_of(documents: dict[str, bytes], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, pax_headers={"comment": "x"}) as tar:
        for name, content in documents.items():
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(content), 3.5 if format == tarfile.PAX_FORMAT else 3
            tar.addfile(header, io.BytesIO(content))
        for name, kind in (("folder.d", tarfile.DIRTYPE), ("link.txt", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
    return buffer.getvalue()


def end_of(tar: bytes) -> int:
    """Return where the blocks of zeros begin."""
    return -(-len(tar.rstrip(b"\0")) // BLOCK) * BLOCK


def texts(tar: str) -> list[bytes]:
    documents = TarDocuments(
        tokenizer="byte", end_of_document=None, text_field="text", token_type="uint16", vocab_size=257
    )
    return [bytes(tokens[:-1].astype(np.uint8)) for tokens in documents.read(tar)]


def header_with(at: int, field: bytes, tar: bytes) -> bytes:
    """Change a header and give it a checksum that is right."""
    header = bytearray(tar[:BLOCK])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[BLOCK:]


def spoilt(tar: bytes, at: int) -> bytes:
    return tar[:at] + bytes([tar[at] ^ 64]) + tar[at + 1 :]


HEALTHY: dict[str, Callable[[bytes], bytes]] = {
    "padded to 10 KiB": lambda tar: tar,
    "with two blocks of zeros": lambda tar: tar[: end_of(tar)] + bytes(1024),
    "with one": lambda tar: tar[: end_of(tar)] + bytes(512),
    "padded to 1 MiB": lambda tar: tar + bytes(2**20 - len(tar)),
    "gzip": gzip.compress,
    "gzip in two parts": lambda tar: gzip.compress(tar[:3000]) + gzip.compress(tar[3000:]),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda tar: pyarrow.compress(tar, "zstd", asbytes=True),
}


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("healthy", HEALTHY)
def test_healthy_tars_are_read(tmp_path: Path, healthy: str, form: str, long: bool) -> None:
    tail = "k" * 150 if long and form != "ustar" else ""
    folder = "folder/" * 18 if long else ""
    documents = {f"{folder}{tail}{name}": content for name, content in DOCUMENTS.items()}
    path = tmp_path / "0.tar"
    path.write_bytes(HEALTHY[healthy](tar_of(documents, format=FORMATS[form])))
    assert texts(str(path)) == texts(f"file://{path}") == [text for text in DOCUMENTS.values() if text]
    fsspec.filesystem("memory").pipe_file("/0.tar", path.read_bytes())
    assert texts("memory://0.tar") == texts(str(path))


def test_members_that_are_no_documents_are_passed_over(tmp_path: Path) -> None:
    others = {
        "a.mp4": bytes(3 << 20),
        "a.txt": b"one",
        "__meta__/c.txt": b"x",
        "README": b"x",
        "b.TXT": b"two",
        "b.cls": b"",
    }
    write_tar(tmp_path / "0.tar", others)
    assert texts(str(tmp_path / "0.tar")) == [b"one", b"two"]


TAR = tar_of(DOCUMENTS)
THIRD = TAR.index(b"03.txt")  # where its header is
END = end_of(TAR)
DAMAGED = {
    # name: what is there, what the error says
    "cut in the first header": (TAR[:300], r"no header of a member at byte 0: truncated header"),
    "cut in a header": (TAR[: THIRD + 300], rf"at byte {THIRD:,}: truncated header \(read .* after member 02\.txt\)"),
    "cut in the content": (TAR[: THIRD + 900], r"claims 2,970 bytes, where 388 are left .* in member 03\.txt\)"),
    "cut in the content at a block": (TAR[: THIRD + 1024], r"where 512 are left .* in member 03\.txt"),
    "cut in the padding": (TAR[: TAR.index(b"04.txt") - 1], r"unexpected end of data \(.* after member 03\.txt"),
    "cut between two members": (TAR[:THIRD], rf"no end: .* \(read up to byte {THIRD:,}, after member 02\.txt\)"),
    "without an end": (TAR[:END], r"no end: the blocks of zeros .* are missing"),
    "cut in its end": (TAR[: END + 100], rf"at byte {END:,}: truncated header"),
    "a byte of the first header": (spoilt(TAR, 7), "at byte 0: bad checksum"),
    "a byte of a header": (spoilt(TAR, THIRD + 7), rf"at byte {THIRD:,}: bad checksum .* after member 02\.txt"),
    "a byte of a checksum": (spoilt(TAR, THIRD + 150), rf"at byte {THIRD:,}: invalid header"),
    "a header of zeros": (TAR[:THIRD] + bytes(BLOCK) + TAR[THIRD + BLOCK :], "bytes after the end of the tar"),
    "two tars in one": (TAR + TAR, "bytes after the end of the tar"),
    "a claim of 8 GiB": (header_with(124, b"77777777777\0", TAR), "claims 8,589,934,591 bytes"),
    "a claim of 10^11": (header_with(124, b"\x80\0\0\0\0\0\0\x17\x48\x76\xe8\0", TAR), "claims 100,000,000,000 bytes"),
    "a claim below zero": (header_with(124, b"\xff" * 12, TAR), "claims -1 bytes"),
    "a name of 8 GiB": (header_with(124, b"77777777777\0" + bytes(20) + b"L", TAR), "claims 8,589,934,591 bytes"),
    "no tar": (b"<html>not found</html>" * 100, "at byte 0: invalid header"),
    "nothing": (b"", "an empty file"),
    "gzip cut": (gzip.compress(TAR)[:-20], "EOFError"),
    "gzip cut in its sum": (gzip.compress(TAR)[:-3], "EOFError"),
    "gzip with a byte changed": (spoilt(gzip.compress(TAR), 60), "error|BadGzipFile|bad checksum"),
    "gzip of a tar that is cut": (gzip.compress(TAR[:THIRD]), "no end"),
    "xz cut": (lzma.compress(TAR)[:-20], "EOFError"),
    "bzip2 cut": (bz2.compress(TAR)[:-20], "EOFError"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named_with_its_place(tmp_path: Path, damage: str) -> None:
    content, found = DAMAGED[damage]
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} must be a whole tar of WebDataset samples; found .*{found}") as here:
        texts(str(path))
    assert here.value.exit_code == 87
    with pytest.raises(DataError, match=rf"file://{path} must be a whole tar of WebDataset samples"):
        texts(f"file://{path}")


@pytest.mark.parametrize("form", FORMATS)
def test_no_cut_is_taken_for_the_end(form: str) -> None:
    tar = tar_of({"k" * 90 + name: content[:600] for name, content in DOCUMENTS.items()}, format=FORMATS[form])
    for cut in range(0, end_of(tar), 61):
        with pytest.raises(TarDamage):
            list(members_of(io.BytesIO(tar[:cut]), lambda name: True, cut))
    for cut in range(0, end_of(tar), BLOCK):
        with pytest.raises(TarDamage):
            list(members_of(io.BytesIO(tar[:cut]), lambda name: False))


def test_memory_is_taken_only_for_bytes_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of unknown size whose member claims 1 GiB, and one that unfolds to more than a document may have."""
    claims = header_with(124, b"%011o\0" % (1 << 30), TAR)
    tracemalloc.start()
    with pytest.raises(TarDamage, match="unexpected end of data"):
        list(members_of(io.BytesIO(claims), lambda name: True))
    bomb = gzip.compress(tar_of({"a.txt": bytes(20 << 20)}))
    monkeypatch.setattr(tar_members, "MOST_MEMBER_BYTES", 1 << 20)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    with pytest.raises(TarDamage, match="more than a document may have"):
        list(members_of(io.BytesIO(bomb), lambda name: True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 8 << 20


def test_signed_shard_whose_tar_is_damaged_is_found(shards: Path) -> None:
    manifest = load_manifest(shards)
    path = shards / manifest.shards[0].name
    at = manifest.shards[0].members[1].tokens_at - BLOCK
    path.write_bytes(spoilt(path.read_bytes(), at + 7))
    forge(shards)
    with pytest.raises(DataError, match=rf"00000\.tar must be a whole tar; found .* at byte {at:,}: bad checksum"):
        verify_shards(shards)


def test_names_of_members_are_said_with_escapes(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a\x1b[2J\n.tok": b"123"})
    with pytest.raises(DataError) as caught:
        texts(str(tmp_path / "0.tar"))
    assert r"sample a\x1b[2J\n.tok must be uint16 ids" in str(caught.value)
    (tmp_path / "0.tar").write_bytes(tar_of({"b\x1b\u202e.txt": b"x" * 600}, format=tarfile.GNU_FORMAT)[:900])
    with pytest.raises(DataError, match=r"in member b\\x1b\\u202e\.txt") as caught:
        texts(str(tmp_path / "0.tar"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}"])
def test_json_that_no_writer_writes_is_named(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "0.tar", {"a.json": content})
    with pytest.raises(DataError, match=r"sample a\.json must be JSON with the field text"):
        texts(str(tmp_path / "0.tar"))


def test_array_that_claims_too_much_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(5))
    content = buffer.getvalue().replace(b"'shape': (5,), }           ", b"'shape': (100000000000,), }")
    write_tar(tmp_path / "0.tar", {"a.npy": content})
    with pytest.raises(DataError, match=r"a\.npy must be .*; found 100,000,000,000 numbers of int64, .* in 40 bytes"):
        texts(str(tmp_path / "0.tar"))


def test_folders_and_pipes_in_place_of_tars_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/0.tar", DOCUMENTS)
    (tmp_path / "shards/1.tar").mkdir()
    for name in ("shards/*.tar", "shards/1.tar", "*/1*"):
        with pytest.raises(DataError, match=r"must be files; found '.*1\.tar', which is a folder"):
            tars_of([str(tmp_path / name)])
    (tmp_path / "shards/1.tar").rmdir()
    assert tars_of([str(tmp_path / "shards")]) == [str(tmp_path / "shards/0.tar")]
    os.mkfifo(tmp_path / "shards/2.tar")
    with pytest.raises(DataError, match=r"2\.tar', which is no file"):
        tars_of([str(tmp_path / "shards/*.tar")])
    for name in ("", "a" * 300, "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(DataError, match="every entry of data.corpus must"):
            tars_of([name])
    for name in ("{0..99999999}", "{5..1}", "{0..1}/{0..999999}", "{0..99999999999}"):
        with pytest.raises(DataError, match=r"1 to 1,000,000 numbers in all; found \{\d+\.\.\d+\}"):
            tars_of([f"s3://x/{name}.tar"])


def test_a_run_ends_at_a_damaged_tar(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train/{number}.tar", DOCUMENTS)
    write_tar(tmp_path / "held/0.tar", DOCUMENTS)
    path = tmp_path / "train/1.tar"
    path.write_bytes(path.read_bytes()[:THIRD])
    batches: Any = build(tmp_path).train_dataloader()
    with pytest.raises(DataError, match=rf"{path} must be a whole tar"):
        for _ in zip(range(1000), batches, strict=False):
            pass


@pytest.mark.slow
def test_no_loader_process_outlives_the_error_that_it_sent(tmp_path: Path) -> None:
    """The error is still at hand; a process that were left would be waited for when the run ends, for ever."""
    write_tar(tmp_path / "train/0.tar", DOCUMENTS)
    write_tar(tmp_path / "held/0.tar", DOCUMENTS)
    (tmp_path / "train/0.tar").write_bytes(TAR[:THIRD])
    batches = build(tmp_path, data={"workers": 1}).train_dataloader()
    with pytest.raises(DataError, match="must be a whole tar") as caught:
        list(batches)
    assert caught.value.exit_code == 87
    assert not multiprocessing.active_children()
