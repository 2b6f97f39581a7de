"""Which files of a folder hold its weights: the choice that transformers makes, or the reason why there is none."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtp_lightning.checkpoint.format.read_shards import MOST_NAMES
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import OddFileError, described, read_object, reason_of

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
MOST_SHARDS = 100_000
LONGEST_NAME_BYTES = 255
_HARMLESS = re.compile(r"[A-Za-z0-9._-]+")
_VARIANT = re.compile(r"model\.([^.-]+)(-\d+-of-\d+)?\.safetensors")
_NO_CHOICE = "Take a release with *.safetensors"
FOREIGN = {
    "*.gguf": ("GGUF, for llama.cpp", _NO_CHOICE + ", or give the file itself in place of the folder"),
    "consolidated*.safetensors": (
        "Mistral's own names",
        "Take model*.safetensors of the release, or put the file and params.json into a folder without config.json",
    ),
    "*.h5": ("TensorFlow", _NO_CHOICE),
    "*.msgpack": ("Flax", _NO_CHOICE),
    "*.onnx": ("ONNX", _NO_CHOICE),
    "*.npz": ("NumPy", _NO_CHOICE),
}
"""Patterns of weights in other formats: what they are, and what to do."""
CONVERSION = (
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('{file}', map_location='cpu', weights_only=True); "
    "save_file({{name: one.clone().contiguous() for name, one in tensors.items()}}, '{target}')"
)


class WeightFiles(NamedTuple):
    """Files of weights of a folder."""

    read: list[Path]
    beside: list[str]  # names of others in the folder, which transformers does not read either


def find_snapshot(path: Path, names: Sequence[str]) -> Path:
    """Find the folder itself: of an entry of the hub's cache (`models--ORG--NAME`), the snapshot that it is at.

    Args:
        path: what the user gave.
        names: files one of which makes a folder a model's.

    Raises:
        CheckpointError: there are several snapshots and none is the one in use.
    """
    snapshots = path / "snapshots"
    try:
        if any((path / name).is_file() for name in names) or not snapshots.is_dir():
            return path
        found = sorted(one.name for one in snapshots.iterdir() if one.is_dir())
        main = path / "refs" / "main"
        in_use = main.read_bytes() if main.is_file() and main.stat().st_size <= LONGEST_NAME_BYTES else b""
    except OSError:
        return path  # what is wrong is told when its settings are read
    if (revision := in_use.decode(errors="replace").strip()) in found:
        return snapshots / revision
    if len(found) == 1:
        return snapshots / found[0]
    raise CheckpointError(
        "an entry of the hub's cache must have one snapshot, or say in refs/main which",
        f"{', '.join(found[:MOST_NAMES]) or 'no snapshot'}, in {path}",
        "Give the folder of the snapshot",
    )


def find_weights(path: Path, pattern: str, *, variant: str | None = None) -> WeightFiles:
    """List the files of weights that a folder speaks of, or has.

    Like transformers: `model.safetensors` before `model.safetensors.index.json`, which names files beside it. Without
    either, the files of a pattern, if they are one model's.

    Raises:
        CheckpointError: there are none, or not all, or it is not clear which.
    """
    if variant is not None and not _HARMLESS.fullmatch(variant):
        raise CheckpointError("--variant must be a name, like fp16", described(variant), "Correct it or leave it out")
    read = _choose(path, pattern, variant)
    beside = {file.name for file in path.glob("*.safetensors")} - {file.name for file in read}
    return WeightFiles(read, sorted(name for name in beside if not name.startswith("adapter_")))


def _choose(path: Path, pattern: str, variant: str | None) -> list[Path]:
    whole = path / (WHOLE if variant is None else f"model.{variant}.safetensors")
    index = path / (INDEX if variant is None else f"{INDEX.removesuffix('.json')}.{variant}.json")
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _files_of_index(path, index)
    found = sorted(path.glob(pattern if variant is None else f"model.{variant}-*.safetensors"))
    if not found:
        raise _without_weights(path, whole.name if variant else None)
    _check_one_variant(path, found)
    numbered = [name.stem.rpartition("-of-") for name in found]
    if all(middle and total.isdecimal() for _, middle, total in numbered):
        total = numbered[0][2]
        if int(total) > MOST_SHARDS:
            raise _without_shards(path, f"{len(found)} of {total} files")
        width = len(numbered[0][0].rpartition("-")[2])
        stem = numbered[0][0].rpartition("-")[0]
        _check_shards(path, [f"{stem}-{n:0{width}d}-of-{total}.safetensors" for n in range(1, int(total) + 1)])
    return found


def _check_one_variant(path: Path, found: list[Path]) -> None:
    variants = {match[1] if (match := _VARIANT.fullmatch(file.name)) else None for file in found}
    if len(variants) > 1:
        raise CheckpointError(
            "it must be clear which files are the weights",
            f"{', '.join(file.name for file in found[:MOST_NAMES])} in {path}, without {WHOLE} or {INDEX}",
            f"Choose with --variant {min(filter(None, variants))}, or remove the others",
        )


def _files_of_index(path: Path, index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise unreadable(index, "no weight_map")
    names = [*listed.values()]
    _check_names(index, names)
    _check_shards(path, names)
    return [path / name for name in dict.fromkeys(names)]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file holds something else, or cannot be read.
    """
    try:
        return read_object(path)
    except (OSError, OddFileError) as error:
        raise unreadable(path, reason_of(error)) from None


def unreadable(path: Path, found: str) -> CheckpointError:
    """Build the error about a file of settings."""
    return CheckpointError(f"{path.name} must be a JSON object", f"{found}, in {path}", "Download the file again")


def _check_names(index: Path, names: list[Any]) -> None:
    """Check that all files are named as files of the folder itself."""
    if not names:
        raise unreadable(index, "an empty weight_map")
    odd = [name for name in names if not _is_shard_name(name)]
    if odd:
        raise CheckpointError(
            "weight_map must name files *.safetensors of the folder itself",
            f"{described(odd[0])}, in {index}",
            "Download the file again",
        )


def _is_shard_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and name.endswith(".safetensors")
        and not {"/", "\\"} & set(name)
        and len(os.fsencode(name)) <= LONGEST_NAME_BYTES
    )


def _check_shards(path: Path, names: list[str]) -> None:
    missing = dict.fromkeys(name for name in dict.fromkeys(names) if not (path / name).is_file())
    if missing:
        of = f", with {sum(name in missing for name in names)} tensors" if len(names) > len(set(names)) else ""
        more = f" and {len(missing) - MOST_NAMES} more" if len(missing) > MOST_NAMES else ""
        raise _without_shards(path, f"no {', '.join([*missing][:MOST_NAMES])}{more}{of}")


def _without_shards(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "every shard of the weights must be there", f"{found}, in {path}", "Download what is missing"
    )


def _without_weights(path: Path, wanted: str | None) -> CheckpointError:
    if pickles := sorted(file.name for pattern in PICKLES for file in path.glob(pattern)):
        target = WHOLE if len(pickles) == 1 else f"model-{1:05d}-of-{len(pickles):05d}.safetensors"
        return in_pickles(path, pickles, target)
    for pattern, (what, hint) in FOREIGN.items():
        if names := sorted(file.name for file in path.glob(pattern)):
            expected = "weights must be in safetensors files with the names of transformers"
            return CheckpointError(expected, f"{names[0]} ({what}), in {path}", hint)
    others = sorted(file.name for file in path.glob("*.safetensors"))[:MOST_NAMES] if wanted else []
    return CheckpointError(
        f"a folder to import must hold weights in safetensors files{f', here {wanted}' if wanted else ''}",
        f"{', '.join(others) or 'none'} in {path}",
        "Leave --variant out, or name another" if wanted else "Download the folder again, with its *.safetensors",
    )


def in_pickles(path: Path, pickles: list[str], target: str) -> CheckpointError:
    """Build the error about weights that lie in pickles, with the way to convert the first to a file `target`."""
    file = pickles[0] if _HARMLESS.fullmatch(pickles[0]) else "FILE"  # it is pasted into a shell
    command = CONVERSION.format(file=file, target=target)
    more = "" if len(pickles) == 1 else f", and so for the other {len(pickles) - 1} files"
    return CheckpointError(
        "weights must be in safetensors files: a pickle can run any program when it is opened",
        f"{', '.join(pickles)} in {path}",
        f'Take a release with *.safetensors, or convert it where you trust it: python -c "{command}"{more}',
    )
