"""A Slurm cluster as a value: what a job script needs to know of it, from cluster/sites/NAME.yaml."""

import re
import sysconfig
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mtp_lightning.errors import SiteError, visible
from mtp_lightning.files.paths import expanded, remedy_for
from mtp_lightning.files.untrusted import OddFileError, described, reason_of
from mtp_lightning.launch.yaml_files import parse_yaml, read_yaml
from mtp_lightning.recipe.schema.base import Section
from mtp_lightning.recipe.schema.paths import LocalPath, PathOrUrl

Cores = Annotated[int, Field(ge=1, le=65_536)]
Gpus = Annotated[int, Field(ge=0, le=1024)]
Seconds = Annotated[int, Field(ge=1, le=1_000_000)]
MOST_TIME_S = 3660 * 86_400  # ten years
_TIME = re.compile(r"(?:(?P<d>[0-9]{1,9})-)?(?P<a>[0-9]{1,9})(?::(?P<b>[0-9]{1,9}))?(?::(?P<c>[0-9]{1,9}))?")
_MEMORY = re.compile(r"[0-9]{1,15}[KMGTkmgt]?[Bb]?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OVERRIDE = "site."


class Container(Section):
    """A container that every rank runs in (pyxis)."""

    image: PathOrUrl
    """Image, as `srun --container-image` takes it."""
    mounts: list[LocalPath] = Field(default_factory=list)
    """Folders of the node to be seen inside, e.g. /data:/data; the run folder and the shards must be among them."""


class Site(Section):
    """A cluster, or a way to use one."""

    description: str = ""
    """What this site is, shown by `mtp submit`."""
    gpu: str | None = None
    """Type of GPU as `mtp plan` knows it; recipes that cannot fit are then refused. Null: not checked."""
    gpus_per_node: Gpus = 8
    """GPUs of a node; 0 asks for none, for runs on CPUs."""
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node=8 or --gres=gpu:8."""
    partition: str | None = None
    """Partition (queue)."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    reservation: str | None = None
    """Reservation."""
    exclusive: bool = False
    """Take whole nodes."""
    cpus_per_rank: Cores | None = None
    """CPU cores of every rank; also its number of OpenMP threads."""
    memory: str | None = None
    """Host memory per node, e.g. 900G; 0 is all of it."""
    time: str = "24:00:00"
    """Time limit: minutes, HH:MM:SS or days-HH:MM:SS."""
    options: list[str] = Field(default_factory=list)
    """Further options of sbatch, e.g. [--switches=1]."""
    srun_options: list[str] = Field(default_factory=list)
    """Further options of srun, e.g. [--cpu-bind=cores]."""
    modules: list[str] = Field(default_factory=list)
    """Environment modules to load."""
    activate: LocalPath | None = None
    """Script that makes `mtp` available, e.g. /project/env/bin/activate."""
    container: Container | None = None
    """Container to run in, or null."""
    mtp: list[LocalPath] = Field(default=["mtp"], min_length=1)
    """The command `mtp`, e.g. [/project/env/bin/mtp] or [python, -m, mtp_lightning]."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every rank."""
    interconnect: dict[str, str] = Field(default_factory=dict)
    """Variables that tell NCCL and gloo which network to use."""
    scratch: LocalPath | None = None
    """Folder on each node's own disk; temporary files go into a folder of the job beneath it."""
    node_local: list[LocalPath] = Field(default=["/tmp", "/var/tmp", "/dev/shm"])
    """Folders that every node has its own of: a run on several nodes cannot live there."""
    signal: Literal["USR1", "USR2"] = "USR1"
    """Signal that Slurm sends before the time limit."""
    signal_lead_s: Annotated[int, Field(ge=10, le=65_535)] = 300
    """How long before: a step, a validation and a checkpoint must fit. Slurm may send it a minute earlier."""
    wait_s: Seconds = 30
    """How long the other ranks may live when one has ended."""
    max_restarts: Annotated[int, Field(ge=0, le=1_000_000)] = 3
    """Restarts in a row without a new checkpoint; the next one is refused."""

    @property
    def time_s(self) -> int:
        """The time limit in seconds."""
        found = _TIME.fullmatch(self.time)
        assert found is not None
        days, (a, b, c) = found["d"], (int(found[name] or 0) for name in "abc")
        if days is not None:
            return int(days) * 86_400 + a * 3600 + b * 60 + c
        return a * 3600 + b * 60 + c if found["c"] else a * 60 + b


def load_site(name: str, overrides: Sequence[str] = ()) -> Site:
    """Read a site by its name or by the path of its file, with `key=value` laid over it.

    Raises:
        SiteError: There is no such file, or it has unknown keys or wrong values; valid keys are listed.
    """
    path = _find(name)
    try:
        content = read_yaml(path)
    except (OSError, OddFileError) as error:
        found = f"{path}: {reason_of(error)}"
        raise SiteError("a site must be a YAML file that can be read", found, "Correct it") from None
    if not isinstance(content, dict):
        raise SiteError("a site must be a mapping of keys", f"{path} without any", f"Valid keys: {_keys()}")
    for override in overrides:
        key, value = _changed(override)
        content[key] = value
    return _checked(content, str(path))


def _changed(override: str) -> tuple[str, Any]:
    """Split `key=value`, the value in YAML."""
    key, equals, value = override.partition("=")
    expected, hint = "a change of the site must be written site.KEY=VALUE", "Write site.time=02:00:00"
    if not equals:
        raise SiteError(expected, override, hint)
    try:
        return key, parse_yaml(value)
    except OddFileError as error:
        raise SiteError(f"{expected}, the value in YAML", f"{described(OVERRIDE + override)}: {error}", hint) from None


def known_sites() -> list[str]:
    """List the names that `load_site` knows here."""
    return sorted({path.stem for folder in site_folders() for path in folder.glob("*.yaml")})


def site_folders() -> Iterator[Path]:
    """Yield the folders of sites: of this directory, of the source tree, of the user, of the installation."""
    own = Path(__file__).parents[2] / "cluster/sites"
    yield from (Path("cluster/sites"), own)
    if (home := Path(expanded("~"))).is_absolute():  # a user without an entry may have none
        yield home / ".config/mtp_lightning/sites"
    yield Path(sysconfig.get_path("data")) / "share/mtp_lightning/sites"


def _find(name: str) -> Path:
    given = Path(expanded(name))
    if given.suffix in (".yaml", ".yml") or len(given.parts) > 1:
        candidates: list[Path] = [given]
    else:
        candidates = [folder / f"{name}.yaml" for folder in site_folders()]
    for path in candidates:
        try:
            if path.is_file():
                return path
        except OSError:  # a name that no file can have, or a folder that is closed
            continue
    known = known_sites()
    nearest = get_close_matches(name, known, n=1)
    raise SiteError(
        "--site must be the name of a site or the path of its file",
        f"no {given if candidates == [given] else name}",
        f"Did you mean {nearest[0]}?" if nearest else f"Known sites: {', '.join(known) or 'none'}",
    )


def _checked(content: dict[str, Any], where: str) -> Site:
    unknown = [str(key) for key in content if key not in Site.model_fields]
    if unknown:
        nearest = get_close_matches(unknown[0], Site.model_fields, n=1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        raise SiteError(f"{where} must have known keys only", ", ".join(unknown), f"{hint}Valid keys: {_keys()}")
    try:
        site = Site.model_validate(_as_text(content))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise SiteError(f"{where} must be a valid site", "; ".join(faults), "Correct these") from None
    _check_values(site, where)
    return site


def _as_text(content: dict[str, Any]) -> dict[str, Any]:
    """Let numbers stand for text where text is meant: `memory: 0`, `time: 30`, `NCCL_IB_TC: 106`."""
    plain: dict[str, Any] = {key: _number_as_text(content[key]) for key in ("memory", "time") if key in content}
    for key in ("environment", "interconnect"):
        if isinstance(content.get(key), dict):
            plain[key] = {name: _number_as_text(value) for name, value in content[key].items()}
    return content | plain


def _number_as_text(value: Any) -> Any:
    try:
        return str(value) if isinstance(value, int | float) else value
    except ValueError:  # more digits than Python writes out: no text, which is refused
        return value


def _check_values(site: Site, where: str) -> None:
    wrong = [name for name in (*site.environment, *site.interconnect) if not _VARIABLE.fullmatch(name)]
    if wrong:
        raise SiteError(f"{where} must name variables by letters, digits and _", repr(wrong[0]), "Rename it")
    _check_text(site.model_dump(), where)
    _check_places(site, where)
    if site.memory is not None and not _MEMORY.fullmatch(site.memory):
        expected = f"{where} must give memory per node as Slurm does"
        raise SiteError(expected, repr(site.memory), "Write e.g. memory: 900G")
    if site.gpu is not None and not site.gpus_per_node:
        raise SiteError(
            f"{where} must have gpus_per_node of 1 or more where it names a gpu",
            f"gpus_per_node: 0 and gpu: {site.gpu}",
            "Correct gpus_per_node; for runs on CPUs, remove gpu",
        )
    _check_time(site, where)


def _check_text(values: dict[str, Any], where: str) -> None:
    """Refuse text that would break a line of the job script or of the screen, wherever it stands."""
    for path, text in _texts(values, ""):
        is_harmless = visible(text) == text if path == "description" else text.isprintable()
        if not is_harmless:
            raise SiteError(
                f"{where} must hold printable text on one line: it goes into a job script",
                f"{path}: {described(text)}",
                "Take line breaks and control characters out",
            )


def _check_places(site: Site, where: str) -> None:
    """Refuse paths that nothing can be found by: what a job script holds is not expanded on the nodes."""
    places = site.model_dump(include={"activate", "container", "mtp", "scratch", "node_local"})
    for path, text in _texts(places, ""):
        if remedy := remedy_for(text, may_be_url=path == "container.image"):
            raise SiteError(
                f"{where} must hold paths in which ~ and $NAME can be expanded here", f"{path}: {text}", remedy
            )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield all texts in a value, each with its path."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, str):
        yield path, value
    for name, entry in inner:
        yield from _texts(entry, f"{path}.{name}" if path else str(name))


def _check_time(site: Site, where: str) -> None:
    """Refuse a time limit that is none, or that the signal comes too early for."""
    if not _TIME.fullmatch(site.time):
        raise SiteError(
            f"{where} must give time as minutes, HH:MM:SS or D-HH:MM:SS", repr(site.time), "Write e.g. time: 24:00:00"
        )
    if site.signal_lead_s >= site.time_s:
        raise SiteError(
            f"{where} must have signal_lead_s below time",
            f"{site.signal_lead_s} s and {site.time_s} s",
            "Raise time, or lower signal_lead_s",
        )
    if site.time_s > MOST_TIME_S:
        raise SiteError(f"{where} must have a time of ten years at most", repr(site.time), "Write e.g. time: 24:00:00")


def _keys() -> str:
    return ", ".join(Site.model_fields)
