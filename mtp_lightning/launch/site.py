"""A Slurm cluster as a value: what a job script needs to know of it, from cluster/sites/NAME.yaml."""

import re
import sysconfig
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from mtp_lightning.errors import SiteError
from mtp_lightning.recipe.section import PositiveInt, Section
from mtp_lightning.recipe.yaml12 import RecipeYamlLoader

_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OVERRIDE = "site."


class Container(Section):
    """A container that every rank runs in (pyxis)."""

    image: str
    """Image, as `srun --container-image` takes it."""
    mounts: list[str] = Field(default_factory=list)
    """Folders of the node to be seen inside, e.g. /data:/data; the run folder and the shards must be among them."""


class Site(Section):
    """A cluster, or a way to use one."""

    description: str = ""
    """What this site is, shown by `mtp submit`."""
    gpu: str | None = None
    """Type of GPU as `mtp plan` knows it; recipes that cannot fit are then refused. Null: not checked."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
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
    cpus_per_rank: PositiveInt | None = None
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
    activate: str | None = None
    """Script that makes `mtp` available, e.g. /project/env/bin/activate."""
    container: Container | None = None
    """Container to run in, or null."""
    mtp: list[str] = Field(default=["mtp"], min_length=1)
    """The command `mtp`, e.g. [/project/env/bin/mtp] or [python, -m, mtp_lightning]."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every rank."""
    interconnect: dict[str, str] = Field(default_factory=dict)
    """Variables that tell NCCL and gloo which network to use."""
    scratch: str | None = None
    """Folder on each node's own disk; temporary files go into a folder of the job beneath it."""
    node_local: list[str] = Field(default=["/tmp", "/var/tmp", "/dev/shm"])
    """Folders that every node has its own of: a run on several nodes cannot live there."""
    signal: Literal["USR1", "USR2"] = "USR1"
    """Signal that Slurm sends before the time limit."""
    signal_lead_s: Annotated[int, Field(ge=10, le=65_535)] = 300
    """How long before: a step, a validation and a checkpoint must fit. Slurm may send it a minute earlier."""
    wait_s: PositiveInt = 30
    """How long the other ranks may live when one has ended."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
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
        content = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SiteError("a site must be a YAML file that can be read", f"{path}: {error}", "Correct it") from None
    if not isinstance(content, dict):
        raise SiteError("a site must be a mapping of keys", f"{path} without any", f"Valid keys: {_keys()}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise SiteError("a change of the site must be written site.KEY=VALUE", override, "Write site.time=02:00:00")
        content[key] = _parse(value)
    return _checked(content, str(path))


def known_sites() -> list[str]:
    """List the names that `load_site` knows here."""
    return sorted({path.stem for folder in site_folders() for path in folder.glob("*.yaml")})


def site_folders() -> Iterator[Path]:
    """Yield the folders of sites: of this directory, of the source tree, of the user, of the installation."""
    own = Path(__file__).parents[2] / "cluster/sites"
    yield from (Path("cluster/sites"), own, Path.home() / ".config/mtp_lightning/sites")
    yield Path(sysconfig.get_path("data")) / "share/mtp_lightning/sites"


def _find(name: str) -> Path:
    given = Path(name)
    if given.suffix in (".yaml", ".yml") or len(given.parts) > 1:
        candidates: list[Path] = [given]
    else:
        candidates = [folder / f"{name}.yaml" for folder in site_folders()]
    for path in candidates:
        if path.is_file():
            return path
    known = known_sites()
    nearest = get_close_matches(name, known, n=1)
    raise SiteError(
        "--site must be the name of a site or the path of its file",
        f"no {given if candidates == [given] else name}",
        f"Did you mean {nearest[0]}?" if nearest else f"Known sites: {', '.join(known) or 'none'}",
    )


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=RecipeYamlLoader)


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
    plain: dict[str, Any] = {key: str(content[key]) for key in ("memory", "time") if isinstance(content.get(key), int)}
    for key in ("environment", "interconnect"):
        if isinstance(content.get(key), dict):
            plain[key] = {name: str(v) if isinstance(v, int | float) else v for name, v in content[key].items()}
    return content | plain


def _check_values(site: Site, where: str) -> None:
    wrong = [name for name in (*site.environment, *site.interconnect) if not _VARIABLE.fullmatch(name)]
    if wrong:
        raise SiteError(f"{where} must name variables by letters, digits and _", repr(wrong[0]), "Rename it")
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


def _keys() -> str:
    return ", ".join(Site.model_fields)
