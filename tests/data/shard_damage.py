"""Ways to damage a shard folder, without end and by a seed: any file of it cut, flipped, replaced or made to lie."""

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mtp_lightning.data.shards.manifest import fingerprint_of
from tests.data.corpora import forge

ODD_VALUES: tuple[Any, ...] = (
    *(10**11, -1, 0, 1, 1.5, float("nan"), float("inf"), 10**30, 2**63, True, None),
    *("", "x", "\x1b[2J\u202e", "../../x", "\ud800", "9" * 5000, [], {}, [[]], {"a": 1}),
)


def damage_folder(folder: Path, draw: Random, *, keeps_files: bool = False) -> str:
    """Damage one thing; return what, in words. With `keeps_files` all files stay files that can be read."""
    kinds = [_spoil_bytes, _spoil_bytes, _lie_in_manifest, _lie_in_index, _lie_in_tar]
    return draw.choice(kinds if keeps_files else [_replace, _replace, *kinds])(folder, draw)


def _files(folder: Path) -> list[Path]:
    """List the manifest, the index and one shard of each split."""
    return [folder / name for name in ("manifest.json", "index.npz", "train/00001.tar", "validation/00000.tar")]


def _replace(folder: Path, draw: Random) -> str:
    """Put something else in the place of a file, of the folder of a split, or of all."""
    path = draw.choice([*_files(folder), folder / "train", folder])
    name, replacement = draw.choice([*REPLACEMENTS.items()])
    is_file = path.is_file()
    if name == "mode 000":
        path.chmod(0)
        return f"{path.name} of {name}"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    replacement(path)
    return f"{path.name}, {'a file' if is_file else 'a folder'}, replaced by {name}"


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


REPLACEMENTS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "an empty file": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a dangling link": lambda path: path.symlink_to(path.with_name("nowhere")),
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a folder": lambda path: path.symlink_to("/"),
    "1 TiB of zeros": _sparse,
    "text": lambda path: path.write_bytes("träume\n".encode("latin-1") * 99),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "mode 000": lambda path: None,
}


def _spoil_bytes(folder: Path, draw: Random) -> str:
    path = draw.choice(_files(folder))
    content = path.read_bytes()
    at = draw.randrange(len(content))
    name, changed = draw.choice(
        [
            ("cut", content[:at]),
            ("cut at a block", content[: at // 512 * 512]),
            ("flipped", content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]),
            ("overwritten by zeros", content[:at] + bytes(min(600, len(content) - at)) + content[at + 600 :]),
            ("doubled", content + content),
            ("longer by a block", content + bytes(512)),
            ("with its parts in another order", content[at:] + content[:at]),
        ]
    )
    path.write_bytes(changed)
    is_signed = path.suffix == ".tar" and draw.random() < 0.5 and len(changed) % 512 == 0 and len(changed) > 0
    if is_signed:
        forge_size(folder)
    return f"{path.name} {name} at {at}{', signed' if is_signed else ''}"


def forge_size(folder: Path) -> None:
    """Sign shards as they are now; where what the manifest says of them is no longer possible, only the manifest."""
    content = json.loads((folder / "manifest.json").read_text())
    for shard in content["shards"]:
        shard["num_bytes"] = (folder / shard["name"]).stat().st_size
    try:
        forge(folder, shards=content["shards"])
    except ValueError:  # a member now reaches beyond its shard
        sign(folder, content)


def sign(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest of any content with the fingerprint that goes with it."""
    content.pop("fingerprint", None)
    text = json.dumps({"fingerprint": fingerprint_of(content), **content})
    (folder / "manifest.json").write_text(text)


def _lie_in_manifest(folder: Path, draw: Random) -> str:
    content = json.loads((folder / "manifest.json").read_text())
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(content)
    node, key = draw.choice(places)
    other, other_key = draw.choice(places)
    action = draw.choice(["set", "set", "delete", "swap", "add"])
    value = draw.choice(ODD_VALUES)
    if action == "set":
        node[key] = value
    elif action == "delete":
        del node[key]
    elif action == "add" and isinstance(node, dict):
        node[f"more{value if isinstance(value, str) else ''}"] = value
    else:
        value, node[key] = node[key], json.loads(json.dumps(other[other_key]))
        other[other_key] = json.loads(json.dumps(value))
    if draw.random() < 0.8:
        sign(folder, content)
    else:
        (folder / "manifest.json").write_text(json.dumps(content))
    if draw.random() < 0.5:
        _follow(folder)
    return f"manifest: {action} {key} to {str(value)[:40]!r}"


def _follow(folder: Path) -> None:
    """Let the index say what a lying manifest says, if it can be said."""
    try:
        forge(folder)
    except Exception:  # the lie is one that no index can tell
        return


def _claiming(shape: str, descr: str, content: bytes) -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


def _saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _lie_in_index(folder: Path, draw: Random) -> str:
    arrays = dict(np.load(folder / "index.npz"))
    name = draw.choice([*arrays])
    array = arrays[name]
    lies: dict[str, Callable[[], bytes | None]] = {
        "10^11 entries": lambda: _claiming("(100000000000,)", "<i8", array.tobytes()),
        "-1 entries": lambda: _claiming("(-1,)", "<i8", array.tobytes()),
        "no header": lambda: array.tobytes(),
        "a header of 64 kB": lambda: _claiming("(" * 30_000, "<i8", b""),
        "floats": lambda: _saved(array.astype(float)),
        "NaN": lambda: _saved(np.full(array.shape, np.nan)),
        "negative": lambda: _saved(-1 - array.astype(np.int64)),
        "huge": lambda: _saved(array.astype(np.int64) + 10**11),
        "short": lambda: _saved(array[:-1]),
        "long": lambda: _saved(np.append(array, array)),
        "empty": lambda: _saved(array[:0]),
        "two dimensions": lambda: _saved(array[None]),
        "a number": lambda: _saved(np.int64(3)),
        "strings": lambda: _saved(array.astype(str)),
        "objects": lambda: _saved(array.astype(object)),
        "records": lambda: _saved(np.zeros(3, dtype=[("a", "<i8")])),
        "times": lambda: _saved(array.astype("M8[s]")),
        "big-endian": lambda: _saved(array.astype(">i8")),
        "missing": lambda: None,
        "unfolding to 1 GiB": lambda: _claiming("(134217728,)", "<i8", bytes(1 << 24)),
    }
    lie = draw.choice([*lies])
    content = lies[lie]()
    with zipfile.ZipFile(folder / "index.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for other, own in arrays.items():
            if other != name:
                archive.writestr(f"{other}.npy", _saved(own))
            elif content is not None:
                archive.writestr(f"{name}.npy", content)
    return f"index: {name} {lie}"


def _lie_in_tar(folder: Path, draw: Random) -> str:
    """Change a header of a member, with a right checksum or not, and sign the shard."""
    path = draw.choice(_files(folder)[2:])
    content = bytearray(path.read_bytes())
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    at = draw.choice(headers)
    field, value = draw.choice(
        [
            (0, b"\xff\xfe.tok\0"),
            (0, b"../../x.tok\0"),
            (0, b"\x1b[2J.tok\0"),
            (0, bytes(100)),
            (124, b"77777777777\0"),
            (124, b"\xff" * 12),
            (124, b"-0000000001\0"),
            (124, b"notanumber!\0"),
            (156, b"L"),
            (156, b"x"),
            (156, b"1"),
            (156, b"S"),
            (156, b"5"),
            (257, b"nothing"),
        ]
    )
    content[at + field : at + field + len(value)] = value
    if draw.random() < 0.8:
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(bytes(content))
    if draw.random() < 0.7:
        forge(folder)
    return f"{path.name}: header at {at}, {value!r} at {field}"
