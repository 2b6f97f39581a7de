"""A real Slurm on this machine, and what tests ask of it."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import warm
from tests.support.runs import ROOT

SCRIPT = ROOT / "cluster/local/slurm.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")


def reason_to_skip() -> str | None:
    """Say what is missing for a local Slurm, if anything is."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "a local Slurm must be started by root"


@dataclass(frozen=True)
class Cluster:
    """A running local Slurm."""

    folder: Path

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command against this Slurm; return what it prints."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout + done.stderr

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point every Slurm command here."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return inherited | {"SLURM_CONF": f"{self.folder}/slurm.conf", "OMP_NUM_THREADS": "1"}

    def submit(self, *arguments: str, verb: str = "submit") -> str:
        """Submit by `mtp submit --site local`, or `mtp sweep`; return the job's id."""
        mtp = (sys.executable, "-m", "mtp_lightning")
        own = f"site.mtp=[{warm.server().python}, -m, mtp_lightning]"
        words = arguments if any(word.startswith("site.mtp=") for word in arguments) else (*arguments, own)
        said = self.run(*mtp, verb, *words, "--site", "local")
        found = re.search(r"^job (\d+)", said, re.MULTILINE)
        assert found, said
        return found[1]

    def job(self, job: str) -> dict[str, str]:
        """Ask for everything that Slurm knows of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)

    def state(self, job: str) -> str:
        """Ask for a job's state."""
        return self.job(job)["JobState"]

    def until(self, is_so: Callable[[], object], timeout_s: float = 200) -> None:
        """Wait until something is so."""
        end = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < end, self.run("squeue", "--states=all")
            time.sleep(0.2)

    def until_state(self, job: str, *states: str, timeout_s: float = 300) -> None:
        """Wait until a job is in one of some states."""
        self.until(lambda: self.state(job) in states, timeout_s)

    def kill_node(self, node: str) -> None:
        """Let a node die with everything on it."""
        subprocess.run([SCRIPT, "kill-node", self.folder, node], check=True)

    def revive_node(self, node: str) -> None:
        """Start a dead node again."""
        subprocess.run([SCRIPT, "revive-node", self.folder, node], check=True)


@contextmanager
def local_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a Slurm of two nodes and end it after the body; every worker of pytest-xdist has ports of its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    subprocess.run([SCRIPT, "up", folder, "2"], check=True, env=os.environ | {"PORT": str(26950 + 10 * worker)})
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True)


def output_of(run: Path) -> str:
    """Return what the jobs of a run have printed."""
    return "".join(path.read_text(errors="replace") for path in sorted(run.glob("logs/submit_*/slurm-*.out")))


def attempts_of(run: Path) -> int:
    """Count the starts of a run that came as far as its folder."""
    return len(list(run.glob("logs/attempt_*")))
