"""The text of a job script: options of sbatch, the site's environment, then what is the same for every job."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from mtp_lightning.errors import LaunchError
from mtp_lightning.launch.site import Site


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of a job: the only one, or one of a sweep."""

    recipe: Path  # the resolved recipe, in a file of its own
    run: Path


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run, without anything of a cluster."""

    name: str
    num_nodes: int
    ranks_per_node: int
    tasks: Sequence[Task]
    logs: Path
    cwd: Path
    has_preflight: bool = False  # run `mtp preflight` before the first start, and go no further if it fails
    commands: Sequence[Sequence[str]] = ()  # words of `mtp` to run on each run, instead of training


RUN = "{run}"
"""Stands for the run folder in a command."""


def render(job: Job, site: Site, site_name: str) -> str:
    """Return the script; everything in it that comes from a recipe or a site is quoted.

    Raises:
        LaunchError: A value has a line break or another control character in it.
    """
    lines = [
        "#!/bin/bash -l" if site.modules else "#!/bin/bash",  # a login shell knows `module`
        *(f"#SBATCH {option}" for option in _options(job, site)),
        f"# Written by `mtp submit` for the site {_quoted(site_name)}.",
        "",
        *_array("recipes", [str(task.recipe) for task in job.tasks]),
        *_array("runs", [str(task.run) for task in job.tasks]),
        "recipe=${recipes[${SLURM_ARRAY_TASK_ID:-0}]} run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
        *([] if job.commands else [_limits(job, site)]),
        f"cd {_quoted(str(job.cwd))} || exit 1",
        *_preparation(site),
        f"mtp=({_words(site.mtp)})",
        f"srun=({_words(_srun(job, site))})",
    ]
    if not job.commands:
        return "\n".join(lines) + "\n\n" + _body("job_body")
    commands = [f"follow {_command(words)}" for words in job.commands]
    return "\n".join(lines) + "\n\n" + _body("follow_body") + "\n".join(commands) + '\nexit "$first"\n'


def _limits(job: Job, site: Site) -> str:
    return f"max_restarts={site.max_restarts} limit_s={site.time_s} has_preflight={job.has_preflight:d}"


def _command(words: Sequence[str]) -> str:
    """Quote the words of a command, but for the run folder, which is the job's variable; it comes last if not named."""
    named = words if any(RUN in word for word in words) else [*words, RUN]
    return " ".join('"$run"'.join(_quoted(part) if part else "" for part in word.split(RUN)) or "''" for word in named)


def _options(job: Job, site: Site) -> list[str]:
    gpus = {"gpus-per-node": "--gpus-per-node={}", "gres": "--gres=gpu:{}"}[site.gpu_request]
    is_array = len(job.tasks) > 1
    options = {
        "job-name": job.name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "nodes": job.num_nodes,
        "ntasks-per-node": job.ranks_per_node,
        "cpus-per-task": site.cpus_per_rank,
        "mem": site.memory,
        "time": site.time,
        "signal": None if job.commands else f"{site.signal}@{site.signal_lead_s}",
        "open-mode": "append",
        "output": f"{_escaped(job.logs)}/slurm-{'%A_%a' if is_array else '%j'}.out",
        "array": f"0-{len(job.tasks) - 1}" if is_array else None,
    }
    given = [f"--{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    asked_gpus = [gpus.format(job.ranks_per_node)] if site.gpus_per_node else []
    flags = ["--requeue", *(["--exclusive"] if site.exclusive else [])]
    return [*given, *asked_gpus, *flags, *map(_quoted, site.options)]


def _preparation(site: Site) -> list[str]:
    """Return the lines that load what the site needs."""
    variables = site.environment | site.interconnect
    if site.cpus_per_rank:
        variables = {"OMP_NUM_THREADS": str(site.cpus_per_rank), **variables}
    lines = [f"module load {_words(site.modules)} || exit 1"] if site.modules else []
    lines += [f"source {_quoted(site.activate)} || exit 1"] if site.activate else []
    lines += [f"export {name}={_quoted(value)}" for name, value in variables.items()]
    if site.scratch:
        lines.append(f'export TMPDIR={_quoted(site.scratch)}/"$SLURM_JOB_ID"')
        lines.append('srun --ntasks-per-node=1 mkdir -p "$TMPDIR" || exit 1')
    return lines


def _srun(job: Job, site: Site) -> list[str]:
    """Return srun's words: exit codes survive, and ranks that wait for one that has ended are ended."""
    words = ["srun", "--kill-on-bad-exit=0", f"--wait={site.wait_s}"]
    words += [f"--nodes={job.num_nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    words += [f"--cpus-per-task={site.cpus_per_rank}"] if site.cpus_per_rank else []  # not inherited since Slurm 22.05
    if site.container:
        words.append(f"--container-image={site.container.image}")
        words += [f"--container-mounts={','.join(site.container.mounts)}"] if site.container.mounts else []
    return [*words, *site.srun_options]


def _array(name: str, values: Sequence[str]) -> list[str]:
    if len(values) == 1:
        return [f"{name}=({_quoted(values[0])})"]
    return [f"{name}=(", *(f"    {_quoted(value)}" for value in values), ")"]


def _words(values: Sequence[str]) -> str:
    return " ".join(map(_quoted, values))


def _quoted(text: str) -> str:
    if not text.isprintable():
        raise LaunchError(
            "what goes into a job script must be printable text on one line",
            repr(text),
            "Take line breaks and control characters out of names, paths and the site",
        )
    return shlex.quote(text)


def _escaped(path: Path) -> str:
    """Keep Slurm from reading %j and the like in a path."""
    return str(path).replace("%", "%%")


@cache
def _body(name: str) -> str:
    return files("mtp_lightning.launch").joinpath(f"{name}.sh").read_text(encoding="utf-8")
