"""Asking Slurm: submit, try a submission out, list jobs."""

import re
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

from mtp_lightning.errors import LaunchError

ANSWER_S = 60
LIST_S = 5
_JOB = re.compile(r"\d+(_\d+)?")


def submit(script: Path, *, after: str | None = None, per_task: bool = False, is_test: bool = False) -> str:
    """Submit a script, or only ask whether and when it could start; return the job's id, or what Slurm says.

    Args:
        script: the script.
        after: job that must have ended well before; if it has not, this one is cancelled.
        per_task: wait task by task, where both are arrays of the same length.
        is_test: only ask.

    Raises:
        LaunchError: There is no sbatch, or Slurm refuses the job.
    """
    options = ["--test-only"] if is_test else ["--parsable"]
    if after is not None:
        check_job(after)
        options += [f"--dependency={'aftercorr' if per_task else 'afterok'}:{after}", "--kill-on-invalid-dep=yes"]
    done = _run(["sbatch", *options, str(script)], ANSWER_S)
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise LaunchError(
            "Slurm must take the job",
            said or f"exit code {done.returncode} of sbatch",
            "Correct partition, nodes, account or time: site.KEY=VALUE changes the site for one submission",
        )
    return said if is_test else done.stdout.strip().partition(";")[0]


def check_job(after: str) -> None:
    """Check what is to be waited for.

    Raises:
        LaunchError: It is not the number of a job.
    """
    if not _JOB.fullmatch(after):
        raise LaunchError("--after must be the number of a job", repr(after), "Take it from squeue")


def job_states(ids: Collection[str]) -> dict[str, str]:
    """Ask for the states of jobs that Slurm still knows, by their ids, array tasks as 12_0; none without Slurm."""
    if not ids:
        return {}
    jobs = ",".join(sorted({job.partition("_")[0] for job in ids}))
    try:
        done = _run(["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={jobs}"], LIST_S)
    except LaunchError:
        return {}
    pairs = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _run(command: Sequence[str], timeout_s: int) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} must be on PATH to talk to Slurm",
            "no such program",
            "Run this on a login node of the cluster, or use --dry-run",
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{command[0]} must answer within {timeout_s} s", "no answer", "Try again, or ask Slurm by hand: sinfo"
        ) from None
