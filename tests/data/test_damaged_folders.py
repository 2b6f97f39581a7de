"""Damaged shard folders, made by a seed: every verb and every start of a run names the damage, and takes little memory.

Law: whatever is done to a folder, `mtp data verify`, `mtp data stats`, `mtp data peek` and a data module either work or
refuse in three parts with exit code 87; none waits, none takes more than `ROOM_BYTES`. What verify passes, all read.
"""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.errors import DataError
from tests.data.corpora import build_tiny, tiny_recipe, write_corpus
from tests.data.shard_damage import damage_folder

ROOM_BYTES = 1 << 30
MOST_S = 20
NOBODY = 65534
QUICK = range(24)
MANY = range(24, 324)
MANIFEST, INDEX, SHARD = "manifest.json", "index.npz", "train/00001.tar"


class Hangs(BaseException):
    """It takes too long."""


@pytest.fixture(scope="module")
def sound() -> Iterator[Path]:
    """A sound folder, and beside it a corpus and a recipe, where nobody may look, too."""
    with TemporaryDirectory() as name:
        place = Path(name)
        write_corpus(place / "corpus")
        build_tiny([str(place / "corpus")], place / "sound")
        place.chmod(0o755)
        yield place / "sound"


@contextmanager
def bounded(*, as_nobody: bool) -> Iterator[None]:
    """Bound memory and time; without the rights of root where rights are what is damaged."""

    def give_up(*_: object) -> None:
        raise Hangs

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    former = signal.signal(signal.SIGALRM, give_up)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM_BYTES, resource.RLIM_INFINITY))
    signal.alarm(MOST_S)
    is_lowered = as_nobody and os.geteuid() == 0
    if is_lowered:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_lowered:
            os.seteuid(0)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, former)


def verb(*words: object) -> None:
    """Run `mtp data`; a refusal in three parts is raised as what it is."""
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        said = result.stderr[result.stderr.index("error:") :]
        labels = [line.split()[0] for line in said.splitlines()]
        assert (result.exit_code, labels) == (87, ["error:", "found", "hint"]), result.stderr
        assert result.stderr.replace("\n", "").isprintable()
        raise DataError("as said", result.stderr, "as said")


def start(folder: Path) -> None:
    """Do with data what a run does: prepare, then read steps and validations."""
    module = MtpDataModule(tiny_recipe(folder.parent / "cache", folder.parent, data={"shards": str(folder)}))
    module.prepare_data()
    module.setup("fit")
    for batches in (module.train_dataloader(), module.val_dataloader()):
        for _ in islice(batches, 40):
            pass


def peek(folder: Path) -> None:
    recipe = folder.parent / f"{folder.name}.yaml"
    fields: Any = {"data": {"shards": str(folder), "seq_len": 8}, "heads": {"num_offsets": 3}}
    recipe.write_text(yaml.safe_dump({"name": "x", **fields, "run": {"cache": str(folder.parent / "cache")}}))
    verb("peek", recipe)


READERS: dict[str, Callable[[Path], None]] = {
    "verify": lambda folder: verb("verify", folder),
    "stats": lambda folder: verb("stats", folder),
    "start": start,
    "peek": peek,
}


def read_by_all(folder: Path, *, as_nobody: bool) -> dict[str, str | None]:
    """Return what each reader says; None where it reads to the end."""
    said: dict[str, str | None] = {}
    for name, reader in READERS.items():
        try:
            with bounded(as_nobody=as_nobody and name != "peek"):
                reader(folder)
            said[name] = None
        except DataError as error:
            said[name] = str(error)
    return said


def damaged(sound: Path, seed: int) -> tuple[str, dict[str, str | None]]:
    """Damage a copy, read it in every way, and remove it; return the damage and what was said."""
    folder = sound.with_name(f"case{seed}")
    shutil.copytree(sound, folder)
    what = damage_folder(folder, Random(seed))
    try:
        return what, read_by_all(folder, as_nobody="mode 000" in what)
    except (Exception, Hangs) as error:
        raise AssertionError(f"seed {seed}: {what}") from error
    finally:
        for path in (folder, *(folder.glob("**/") if folder.is_dir() and not folder.is_symlink() else ())):
            if not path.is_symlink() and path.exists():
                path.chmod(0o755)
        shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink(missing_ok=True)


def check(sound: Path, seeds: range) -> None:
    refused = 0
    for seed in seeds:
        what, said = damaged(sound, seed)
        refused += said["verify"] is not None
        if said["verify"] is None:
            assert not any(said.values()), f"seed {seed}: {what}: {said}"
    assert refused > 0.7 * len(seeds), "most damages are damages"


@pytest.mark.parametrize("as_nobody", [False, True])
def test_a_sound_folder_is_read_by_all(sound: Path, as_nobody: bool) -> None:
    assert not any(read_by_all(sound, as_nobody=as_nobody).values())


def test_damaged_folders_are_refused_in_three_parts(sound: Path) -> None:
    check(sound, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_damaged_folders_are_refused_in_three_parts(sound: Path) -> None:
    check(sound, MANY)


@pytest.mark.skipif(os.geteuid() != 0, reason="lowers its own rights")
@pytest.mark.parametrize("name", [MANIFEST, INDEX, SHARD, "train", "."])
def test_what_cannot_be_opened_is_named(sound: Path, tmp_path: Path, name: str) -> None:
    folder = sound.with_name("closed")
    shutil.copytree(sound, folder)
    (folder / name).chmod(0)
    try:
        said = read_by_all(folder, as_nobody=True)
    finally:
        (folder / name).chmod(0o755)
        shutil.rmtree(folder)
    for reader in ("verify", "start"):
        assert "ermission denied" in str(said[reader]), (reader, said)
