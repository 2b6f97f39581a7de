"""The members of a sweep on this machine: one `mtp train` after the other, each to its end or on from where it was."""

import signal
import subprocess
import sys
from collections.abc import Sequence

from mtp_lightning.errors import TrainingError
from mtp_lightning.launch.local import shell_code, signals_passed_on, start_mtp
from mtp_lightning.launch.signals import INTERRUPTED, REQUEUE
from mtp_lightning.launch.status import statuses
from mtp_lightning.launch.sweep import Member

DUE = {"new", "stopped", "unreadable", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL"}
DUE |= {"BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE", "REVOKED"}
"""States of a member that is to be trained; in any other it is finished, or left to those who are at it."""


def state_of(member: Member) -> str:
    """Say how far a member is: finished, new, or as `mtp status` says."""
    run = next(iter(statuses([member.folder])), None)
    return "new" if run is None else "finished" if run.is_finished else run.state


def train_members(members: Sequence[Member]) -> None:
    """Train all members that are not finished; one that fails does not keep the others from it.

    Signals are passed on to the run that is being trained, and end the sweep as they end a run.

    Raises:
        KeyboardInterrupt: It was interrupted.
        SystemExit: It was asked to stop, with the code that asks for a requeue.
        TrainingError: Names the members that have failed, with the reasons.
    """
    failures: dict[str, str] = {}
    current: list[subprocess.Popen[bytes]] = []
    with signals_passed_on(current) as heard:
        for number, member in enumerate(members, start=1):
            place, state, failure = f"Run {number} of {len(members)}: {member.name}", state_of(member), None
            if member.starts_from in failures:
                failure = f"not trained: it starts from {member.starts_from}"
            elif state in DUE:
                print(f"{place}, {state}, in {member.folder}", flush=True)
                failure, state = _train(member, current, heard), "trained"
                if failure and (now := state_of(member)) not in DUE:  # another sweep was the first to take it
                    failure, state = None, now
            print(f"{place}: {f'failed: {failure}' if failure else state}", flush=True)
            if failure:
                failures[member.name] = failure
    if failures:
        raise TrainingError(
            "every run of a sweep must end well",
            f"{len(failures)} of {len(members)} failed:\n  " + "\n  ".join(map(": ".join, failures.items())) + "\n",
            "Cure the reason and give the same command again: finished runs are not repeated",
        )


def _train(member: Member, current: list["subprocess.Popen[bytes]"], heard: Sequence[int]) -> str | None:
    """Train a run to its end; return why it failed, or None."""
    said = ""
    if not heard:
        current[:] = [start_mtp(["train", str(member.folder)], stderr=subprocess.PIPE)]
        if heard:  # between its start and that line
            current[0].send_signal(heard[-1])
        assert current[0].stderr is not None
        with current[0]:
            for line in current[0].stderr:
                text = line.decode(errors="replace")
                said = text if text.startswith("error: ") else said
                sys.stderr.write(text)
                sys.stderr.flush()
    code = shell_code(current[0].returncode) if current else 0
    if heard or code in (INTERRUPTED, REQUEUE):
        print("Stopped; the same command goes on from here", flush=True)
        if signal.SIGINT in heard or code == INTERRUPTED:
            raise KeyboardInterrupt
        raise SystemExit(REQUEUE)
    return f"exit code {code}: {said.removeprefix('error: ').strip() or 'see above'}" if code else None
