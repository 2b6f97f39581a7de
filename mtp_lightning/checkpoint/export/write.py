"""One way to disk for every format: streamed, read back, reported tensor by tensor, published by one rename."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtp_lightning.checkpoint.convert.consolidate import DTYPES, Advance, check_whole, consolidate, write_whole
from mtp_lightning.checkpoint.convert.load_model import check_tensors
from mtp_lightning.checkpoint.export.card import CARD, model_card
from mtp_lightning.checkpoint.export.contents import Contents, Source
from mtp_lightning.checkpoint.export.formats import FORMATS, Format, check_holds, engines_for
from mtp_lightning.checkpoint.export.names import FormatName
from mtp_lightning.checkpoint.export.untrained import untrained_heads
from mtp_lightning.checkpoint.format.carried_files import CARRIED, TEMPLATES, TOKENIZERS, copy_files
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.manifest import CONFIG_NAME, DtypeName
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.huggingface.configs import listed
from mtp_lightning.console.progress import say, watched
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.atomic_folder import atomic_folder, check_new_folder, check_staging, staging_path
from mtp_lightning.files.durable import write_durably

REPORT = "export.json"
PARITY = "parity.json"
Check = Callable[[Path, Format, Source], Mapping[str, Any]]
OWN_FILES = ("*.safetensors", "*.json", "*.py", "*.md", "drafter", TEMPLATES, *CARRIED)
"""What the staging folder of an export may hold."""


def export_model(
    path: Path,
    out: Path,
    name: FormatName | str = FormatName.trunk,
    *,
    dtype: DtypeName = "fp32",
    check: Check | None = None,
) -> None:
    """Write a trained model in a format that others read, checked value by value.

    Memory does not grow with the model. The folder appears when it is complete, by one rename.

    Args:
        path: run folder (its newest complete checkpoint is taken), checkpoint, exported or imported folder.
        out: folder to write; new or empty.
        name: one of `names.FormatName`.
        dtype: type of the written weights.
        check: compares the written folder, before it has its name, with the model; what it returns is kept in
            parity.json.

    Raises:
        CheckpointError: there is nothing to export, it is damaged, the format cannot hold it, or `out` cannot be
            written.
    """
    row = FORMATS[FormatName(name)]
    if row.name is FormatName.consolidated:
        consolidate(path, out, dtype=dtype)
        if check is not None:
            say("Verified by mtp itself, its only reader: every value was read back, and is the checkpoint's")
        warn_of_untrained(Source(open_checkpoint(path, verify=False), dtype))
        return
    check_new_folder(out, CheckpointError)
    check_staging(staging_path(out), OWN_FILES, CheckpointError)
    source = Source(open_checkpoint(path), dtype)
    check_holds(row.name, source.recipe)
    assert row.write is not None
    folders = row.write(source)
    report = _report(row, source, folders)
    check_tensors(source.checkpoint)
    size_bytes = _write(row, source, folders, out, report=report, check=check)
    say(f"Exported {source.checkpoint.path} to {out} as {row.name}: {size_bytes / 1e6:,.1f} MB of {dtype}, checked")
    _tell(row, source, folders, out)


def _write(
    row: Format,
    source: Source,
    folders: Mapping[str, Contents],
    out: Path,
    *,
    report: Mapping[str, Any],
    check: Check | None,
) -> int:
    """Write all folders; return the bytes of their weights."""
    dtype = DTYPES[source.dtype]
    sizes = [sum(math.prod(one.weights.shape(name)) for name in one.weights.names) for one in folders.values()]
    total = 2 * source.checkpoint.model_bytes
    with (
        watched(f"Exporting {source.checkpoint.path.name}", total_bytes=total, show=True) as advance,
        atomic_folder(out, CheckpointError, size_bytes=sum(sizes) * dtype.itemsize) as staging,
    ):
        written = sum(_write_folder(one, staging / inside, source, advance) for inside, one in folders.items())
        write_durably(staging / REPORT, json_bytes(report))
        parity = check(staging, row, source) if check else None
        if parity is not None:
            write_durably(staging / PARITY, json_bytes(parity))
        write_durably(staging / CARD, model_card(row, source, report, parity).encode())
    return written


def _write_folder(contents: Contents, folder: Path, source: Source, advance: Advance) -> int:
    folder.mkdir(exist_ok=True)
    file, dtype = folder / contents.weights_file, DTYPES[source.dtype]
    record = write_whole(contents.weights, file, dtype, advance, of_own_type=contents.of_own_type)
    check_whole(contents.weights, ShardReader(folder), advance)
    write_durably(folder / CONFIG_NAME, json_bytes(contents.settings))
    for name, text in contents.texts.items():
        write_durably(folder / name, text.encode())
    copy_files(contents.files, folder)
    return record.size_bytes


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Write a file of settings."""
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _report(row: Format, source: Source, folders: Mapping[str, Contents]) -> dict[str, Any]:
    """Say of every tensor what became of it.

    Raises:
        CheckpointError: a parameter is neither written nor left out for a reason, or a tensor comes from nowhere.
    """
    written: dict[str, list[str]] = {}
    made: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for inside, one in folders.items():
        prefix = f"{inside}/" if inside else ""
        for name, tensor in one.written.items():
            written.setdefault(name, []).append(prefix + tensor)
        made |= {prefix + name: why for name, why in one.made.items()}
        left_out |= one.left_out
    left_out = {name: why for name, why in left_out.items() if name not in written}
    lost = [name for name in source.parameters if name not in written and name not in left_out]
    stored = {f"{inside}/{name}".lstrip("/") for inside, one in folders.items() for name in one.weights.names}
    unknown = sorted(stored - {*made} - {tensor for tensors in written.values() for tensor in tensors})
    if lost or unknown:
        raise CheckpointError(
            f"an export as {row.name} must account for every tensor",
            f"no word of {listed(lost or unknown)}",
            "Export with --format consolidated",
        )
    return {
        "format": row.name.value,
        "source": source.told,
        "dtype": source.dtype,
        "written": written,
        "made": made,
        "left_out": left_out,
    }


def warn_of_untrained(source: Source) -> None:
    """Say which heads nobody has trained."""
    if heads := untrained_heads(source):
        how = "as they began" if source.checkpoint.step else "of step 0"
        say(f"Warning: never trained, {how}: {', '.join(heads)}. Drafts of theirs will rarely be kept", stderr=True)


def _tell(row: Format, source: Source, folders: Mapping[str, Contents], out: Path) -> None:
    """Say on the screen what was left out, who reads the folder, and how."""
    written = {name for one in folders.values() for name in one.written}
    owners = Counter(one.owner for name, one in source.parameters.items() if name not in written)
    if owners:
        told = ", ".join(f"{owner} ({count} tensors)" for owner, count in sorted(owners.items()))
        say(f"Left out, because the format has no place for it: {told}; each by name in {REPORT}")
    if not {*TOKENIZERS} & {*source.files}:
        named = source.recipe.data.tokenizer
        why = "the model reads bytes" if named == "byte" else f"{named} is not there; copy it into {out}"
        say(f"No tokenizer in the folder: {why}")
    warn_of_untrained(source)
    for note in (note for one in folders.values() for note in one.notes):
        say(note)
    for engine in engines_for(row, source.recipe):
        command = engine.serve.format(folder=shlex.quote(str(out)))
        say(f"Read by {engine.name} {engine.versions} (heads: {engine.heads}): {command}")
