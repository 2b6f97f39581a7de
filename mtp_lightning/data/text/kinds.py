"""What the first bytes of a file say that it is, whatever its name."""

import codecs
import re

NUM_BYTES_SNIFFED = 8192
COMPRESSIONS = {
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
}
"""How each of the compressions that are read begins; zstd may begin with a frame to skip."""

OTHERS = {
    "Parquet": rb"PAR1",
    "Arrow": rb"ARROW1",
    "Feather of version 1": rb"FEA1",
    "tar": rb"(?s:.{257})ustar",
    "zip (or what is made of it: .docx, .xlsx, .npz, .pt)": rb"PK(?:\x03\x04|\x05\x06)",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "rar": rb"Rar!\x1a\x07",
    "lz4": rb"\x04\x22\x4d\x18",
    "snappy": rb"\xff\x06\0\0sNaPpY",
    "lzip": rb"LZIP",
    "LZMA": rb"\x5d\0\0[\0-\xff]{2}",
    "compress (.Z)": rb"\x1f\x9d",
    "PDF": rb"%PDF-",
    "Office document": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "Avro": rb"Obj\x01",
    "HDF5": rb"\x89HDF",
    "SQLite": rb"SQLite format 3\0",
    "NumPy": rb"\x93NUMPY",
    "pickle": rb"\x80[\x02-\x05][\x8a-\x95}\]c(]",
    "PNG": rb"\x89PNG\r\n",
    "JPEG": rb"\xff\xd8\xff",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II\*\0|MM\0\*",
    "RIFF (WAV, WebP, AVI)": rb"(?s:RIFF.{4}(?:WAVE|WEBP|AVI ))",
    "MP3": rb"ID3[\x02-\x04]",
    "Ogg": rb"OggS\0",
    "FLAC": rb"fLaC\0",
    "MP4": rb"(?s:\0.{3}ftyp)",
    "Matroska": rb"\x1aE\xdf\xa3",
    "program": rb"\x7fELF|MZ\x90\0|\0asm|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe",
    "GGUF": rb"GGUF[\x01-\x09]\0\0",
    "safetensors": rb"(?s:.{6}\0\0\{\")",
    "ORC": rb"ORC\n?[\0-\x08\x0e-\x1f\x80-\xff]",
    "DuckDB": rb"(?s:.{8}DUCK)",
    "zlib": rb"x[\x01\x9c]",
    "Git LFS pointer": rb"version https://git-lfs\.github\.com/spec/",
}
"""What is no text and has a name; tables and tars are read under endings of their own."""

LFS_POINTER = "Git LFS pointer"
UNMARKED = "UTF-16 without a byte-order mark"
BINARY = "binary"
_KINDS = {**COMPRESSIONS, **OTHERS}
_BEGINNING = re.compile(b"|".join(b"(" + pattern + b")" for pattern in _KINDS.values()))
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, which it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Byte-order marks, and the encodings of what follows them."""


def kind_of(beginning: bytes) -> str | None:
    r"""Name a kind of file by its first 262 bytes or more; None for text, and for all else that has no name here.

    >>> kind_of(b"%PDF-1.7"), kind_of(b"\x1f\x8b\x08\0"), kind_of(b"BZh is a text")
    ('PDF', 'gzip', None)
    """
    found = _BEGINNING.match(beginning)
    return list(_KINDS)[found.lastindex - 1] if found and found.lastindex else None


def encoding_of(beginning: bytes) -> tuple[str | None, int]:
    r"""Return the encoding that a byte-order mark says, and the length of the mark.

    >>> encoding_of(b"\xff\xfea\0"), encoding_of(b"a")
    (('utf-16-le', 2), (None, 0))
    """
    for mark, encoding in MARKS.items():
        if beginning.startswith(mark):
            return encoding, len(mark)
    return None, 0


def binary_kind(content: bytes) -> str | None:
    r"""Name what has NUL bytes near its beginning: UTF-16, where nearly every other byte is one, or binary.

    >>> binary_kind("a text".encode("utf-16-le")), binary_kind(b"a\0\0\1"), binary_kind(b"a")
    ('UTF-16 without a byte-order mark', 'binary', None)
    """
    begin = content[:NUM_BYTES_SNIFFED]
    if b"\0" not in begin:
        return None
    low, high = sorted((begin[::2].count(0), begin[1::2].count(0)))
    return UNMARKED if not low and high > len(begin) * 0.3 else BINARY
