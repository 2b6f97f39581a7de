"""From recipes and a site to a job: what `mtp submit` does."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtp_lightning.errors import LaunchError, RunFolderError, refusal_of
from mtp_lightning.files.durable import write_whole
from mtp_lightning.launch.run_marker import check_may_be_run, claim
from mtp_lightning.launch.sbatch import Job, Task, render
from mtp_lightning.launch.scheduler import submit
from mtp_lightning.launch.site import Site
from mtp_lightning.launch.snapshot import freeze, next_folder
from mtp_lightning.recipe import Recipe, recipe_to_yaml

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that has not been submitted: its script, and the files that go with it."""

    job: Job
    script: str
    recipes: Sequence[Recipe]
    follow_script: str | None = None  # of the job that comes after

    @property
    def folder(self) -> Path:
        """Where the submission is kept."""
        return self.job.logs

    def write(self) -> Path:
        """Write script, recipes and circumstances; return the script's path."""
        path = self.folder / "job.sh"
        recipes = zip(self.job.tasks, self.recipes, strict=True)
        for task in self.job.tasks:
            claim(task.run)
        files = {path: self.script} | {task.recipe: recipe_to_yaml(recipe) for task, recipe in recipes}
        if self.follow_script is not None:
            files[self._follow_path] = self.follow_script
        freeze(self.folder, files, {"runs": [str(task.run) for task in self.job.tasks]})
        return path

    @property
    def _follow_path(self) -> Path:
        return self.folder / "follow.sh"

    def submit(self, *, after: str | None = None) -> tuple[str, str | None]:
        """Write everything down and hand the jobs to Slurm; return the job's id, and that of the one after it."""
        job_id, follow_id = submit(self.write(), after=after), None
        is_array = len(self.job.tasks) > 1
        for index, task in enumerate(self.job.tasks):
            record = {"job": f"{job_id}_{index}" if is_array else job_id, "submission": str(self.folder)}
            _note(task.run / "logs/job.json", record, job_id)
        if self.follow_script is not None:
            follow_id = submit(self._follow_path, after=job_id, per_task=is_array)
        return job_id, follow_id


def _note(path: Path, record: Mapping[str, str], job_id: str) -> None:
    """Write down which job a run was given to, for `mtp status`.

    Raises:
        RunFolderError: It cannot be written; names the job, which Slurm has by now.
    """
    try:
        write_whole(path, json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise RunFolderError(
            f"job {job_id}, which is submitted, must be noted in its run's folder",
            refusal_of(error, path),
            f"Do not submit it again: it will run. Or take it back (scancel {job_id}), make room and submit anew",
        ) from error


def prepare(
    recipes: Sequence[Recipe],
    site: Site,
    site_name: str,
    *,
    folder: Path,
    name: str,
    force: bool = False,
    has_preflight: bool = False,
    then: Sequence[str] = (),
) -> Submission:
    """Check recipes against a site and render the script that runs them: one, or the members of a sweep.

    Args:
        recipes: the runs.
        site: the cluster.
        site_name: shown in the script.
        folder: holds the submission.
        name: the job's.
        force: submit what cannot fit by the planner.
        has_preflight: let the job begin with `mtp preflight`.
        then: commands of `mtp` to run on the finished runs, each as in a shell; `{run}` stands for the run folder.

    Raises:
        LaunchError: the recipes cannot run there, or a command cannot be read.
    """
    commands = [split_command(command) for command in then]
    placed = [_absolute(recipe) for recipe in recipes]
    for own in placed:
        check_fits_site(own, site, force=force)
    ranks = {(own.strategy.num_nodes, own.strategy.ranks_per_node) for own in placed}
    if len(ranks) > 1:
        raise LaunchError("all runs of a sweep must have equally many ranks", f"{sorted(ranks)}", "Submit one by one")
    [(num_nodes, ranks_per_node)] = ranks
    runs = [Path(own.run.dir) for own in placed]
    for run in runs:
        check_may_be_run(run)
    logs = next_folder(folder.absolute())
    files = ["recipe.yaml"] if len(runs) == 1 else [f"recipe_{index}.yaml" for index in range(len(runs))]
    job = Job(
        name=name,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        tasks=[Task(recipe=logs / file, run=run) for file, run in zip(files, runs, strict=True)],
        logs=logs,
        cwd=Path.cwd(),
        has_preflight=has_preflight,
    )
    follow = replace(job, name=f"{job.name}-then", num_nodes=1, ranks_per_node=1, commands=commands)
    return Submission(
        job=job,
        script=render(job, site, site_name),
        recipes=placed,
        follow_script=render(follow, site, site_name) if commands else None,
    )


def split_command(command: str) -> list[str]:
    """Split a command into words as a shell would.

    >>> split_command("export {run} --out 'my model'")
    ['export', '{run}', '--out', 'my model']

    Raises:
        LaunchError: It is empty, or a quote is not closed.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if not words:
        raise LaunchError(
            "--then must be a command of mtp, written as in a shell",
            repr(command),
            "Write e.g. --then 'bench decode', or --then 'export {run} --out {run}/export'",
        )
    return words[1:] if words[0] == "mtp" else words


def _absolute(recipe: Recipe) -> Recipe:
    folder = str(Path(recipe.run.dir).absolute())
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": folder})})


def check_fits_site(recipe: Recipe, site: Site, *, force: bool = False) -> None:
    """Refuse what the job would be refused for, or would burn its allocation on.

    Raises:
        LaunchError: says what does not fit and what would.
    """
    _check_ranks(recipe, site)
    _check_folder(recipe, site)
    if not force:
        _check_memory(recipe, site)


def _check_ranks(recipe: Recipe, site: Site) -> None:
    ranks, gpus, total = recipe.strategy.ranks_per_node, site.gpus_per_node, recipe.strategy.num_ranks
    if gpus and gpus % ranks:
        nodes, rest = divmod(total, gpus)
        hint = f"Set strategy.num_nodes={nodes} strategy.ranks_per_node={gpus}"
        raise LaunchError(
            f"the {gpus} GPUs of a node must be a multiple of strategy.ranks_per_node",
            str(ranks),
            hint if nodes and not rest else f"Choose a number of ranks that is a multiple of {gpus}, or divides it",
        )


def _check_folder(recipe: Recipe, site: Site) -> None:
    folder = Path(recipe.run.dir).absolute()
    own = [local for local in site.node_local if folder.is_relative_to(local)]
    if own and recipe.strategy.num_nodes > 1:
        raise LaunchError(
            f"run.dir of a run on {recipe.strategy.num_nodes} nodes must be on a file system that they share",
            f"{folder}, beneath {own[0]}, which every node has its own of",
            "Give another run.dir, or correct node_local of the site",
        )
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "read-only" if existing.is_dir() else "a file"
        raise LaunchError("run.dir must be a folder that can be written to", f"{existing}, {what}", "Give another")
    if recipe.run.restart:
        raise LaunchError(
            "a submitted run must be able to go on when it is requeued",
            "run.restart=true, which would start it over each time",
            "Give another run.dir, or move the earlier run aside",
        )


def _check_memory(recipe: Recipe, site: Site) -> None:
    if site.gpu is None:
        return
    from mtp_lightning.planner.hardware import hardware
    from mtp_lightning.planner.layout import layout_of
    from mtp_lightning.planner.report import build_variant
    from mtp_lightning.planner.shape import shape_of

    device = hardware(site.gpu)
    variant = build_variant(recipe, shape_of(recipe), layout_of(recipe), device)
    if not variant.fits:
        micro_batch_size = variant.most_micro_rows
        raise LaunchError(
            f"the recipe must fit into the {device.memory_bytes / GIB:.0f} GiB of an {device.name}",
            f"{variant.memory.total / GIB:.1f} GiB by `mtp plan`",
            f"Set batch.micro_batch_size={micro_batch_size}"
            if micro_batch_size
            else "Use more GPUs, a later ZeRO stage or memory.recompute_trunk=true; --force submits all the same",
        )
