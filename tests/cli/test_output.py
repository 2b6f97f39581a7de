"""Stdout and stderr that are closed, full or no longer read: real pipes, /dev/full and processes."""

import json
import os
import subprocess
import sys

import pytest

from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from mtp_lightning.console.errors import BROKEN_PIPE
from tests.support import warm
from tests.support.runs import ROOT, figures

RECIPE = str(ROOT / "recipes/debug/parallel.yaml")
FULL = "error: stdout must take what is printed; found No space left on device. Send it where there is room for it.\n"
DONE = FULL.replace("Send it", "The files are written; send the text")
CLOSED = FULL.replace("No space left on device", "Bad file descriptor")


def shell(words, redirection, **environment):
    """Run `mtp` as bash does; return exit code (of `mtp`, in a pipe), stdout and stderr."""
    command = f'set -o pipefail; "$0" -m mtp_lightning {words} {redirection}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


VERBS = (f"recipe show {RECIPE}", f"plan {RECIPE}", "--help", "--version")
NO_ROOM = (("| true", BROKEN_PIPE, ""), ("> /dev/full", 1, FULL), (">&-", 1, CLOSED), ("> /dev/full 2>&1", 1, ""))


@pytest.mark.parametrize(
    ("words", "redirection", "exit_code", "said"),
    [
        pytest.param(words, *where, marks=() if verb == place else pytest.mark.slow)
        for verb, words in enumerate(VERBS)
        for place, where in enumerate(NO_ROOM)
    ],
)
def test_a_verb_that_cannot_print_ends_without_a_traceback(words, redirection, exit_code, said):
    assert shell(words, redirection) == (exit_code, "", said)


def test_a_reader_that_has_read_enough_ends_a_verb_at_once():
    """Many times what a pipe holds: the verb is stopped in the middle."""
    code, out, err = shell(f"recipe check $(yes {RECIPE} | head -2000)", "| head -1")
    assert (code, out.split()[0], err) == (BROKEN_PIPE, "ok", "")


@pytest.mark.parametrize(
    "redirection", ["2>&-", *(pytest.param(other, marks=pytest.mark.slow) for other in ("2> /dev/full", "2> >(true)"))]
)
def test_stderr_that_takes_nothing_leaves_exit_codes_and_stdout_alone(redirection):
    code, out, _ = shell("recipe check nowhere.yaml", redirection)
    assert (code, out.split()[0]) == (2, "faulty")
    assert shell(f"recipe check {RECIPE}", redirection)[0] == 0


@pytest.mark.parametrize(("redirection", "exit_code", "said"), [("| true", BROKEN_PIPE, ""), ("> /dev/full", 1, FULL)])
def test_what_is_only_written_at_the_end_is_no_exception(tmp_path, redirection, exit_code, said):
    """A script of a few kilobytes stays in the buffer of `print`."""
    submit = f"submit {RECIPE} --site local --dry-run run.dir={tmp_path}/run"
    assert shell(submit, redirection) == (exit_code, "", said)


def test_unbuffered_output_is_no_exception():
    assert shell(f"recipe show {RECIPE}", "> /dev/full", PYTHONUNBUFFERED="1") == (1, "", FULL)
    code, out, _ = shell(f"recipe show {RECIPE}", "", PYTHONUNBUFFERED="1")
    assert (code, "kind: parallel" in out) == (0, True)


def test_files_do_not_get_the_numbers_of_closed_streams():
    code = (
        "import os; from mtp_lightning.console.errors import *; guard_output(print); os._exit(os.open(os.devnull, 0))"
    )
    command = ["bash", "-c", f'"$0" -c "{code}" <&- >&- 2>&-']
    assert subprocess.run([*command, sys.executable], cwd=ROOT, check=False).returncode > 2


@pytest.mark.parametrize("place", [{"RANK": "5", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_ranks_that_a_verb_does_not_need_do_not_matter(place, tmp_path):
    environment = os.environ | {"LOCAL_RANK": "0", "MASTER_PORT": "abc"} | place
    done = warm.run("recipe", "check", RECIPE, cwd=tmp_path, environment=environment, trains=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("redirection", "exit_code", "said"), [("| true", BROKEN_PIPE, ""), ("> /dev/full", 1, DONE)])
def test_a_verb_that_writes_a_file_does_so_though_nobody_sees_it(tmp_path, redirection, exit_code, said):
    words = f"plan {RECIPE} --json {tmp_path}/figures"
    assert shell(words, redirection, PYTHONUNBUFFERED="1") == (exit_code, "", said)
    assert json.loads((tmp_path / "figures").read_text())["recipe"]["name"] == "debug-parallel"


STEPS = "run.steps=12 logging.every_steps=1 checkpoint.every_steps=100 run.validate_every_steps=6"
GONE = "r, w = os.pipe()\nif os.fork() == 0:\n    os.close(w), os.read(r, 1), os._exit(0)\nos.close(r), os.dup2(w, 1)"
LOST = {
    "gone": (GONE, "Broken pipe"),
    "full": ("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", "No space left on device"),
    "closed": ("os.close(1); sys.stdout = None", "Bad file descriptor"),
    "both gone": (f"{GONE}; os.dup2(1, 2)", None),
    "both full": ("[os.dup2(os.open('/dev/full', os.O_WRONLY), fd) for fd in (1, 2)]", None),
    "both closed": ("os.close(1); os.close(2); sys.stdout = sys.stderr = None", None),
}
"""How output is lost, and what is told of it where it can be told."""


@pytest.mark.parametrize(
    "lost", [pytest.param(lost, marks=() if lost == "gone" else pytest.mark.slow) for lost in LOST]
)
def test_a_run_goes_on_to_its_end_when_nobody_sees_it(tmp_path, lost):
    spoil, reason = LOST[lost]
    words = ["train", RECIPE, *STEPS.split(), "run.dir=run", "run.cache=cache"]
    done = warm.run(*words, cwd=tmp_path, code=f"import os, sys\n{spoil}\n{warm.MTP}")
    is_whole(tmp_path, done.returncode, done.stderr, reason)


@pytest.mark.slow
def test_a_run_goes_on_to_its_end_when_its_reader_in_a_shell_has_gone(tmp_path):
    code, _, err = shell(f"train {RECIPE} {STEPS} run.dir={tmp_path}/run run.cache={tmp_path}/cache", "| head -1")
    is_whole(tmp_path, code, err, "Broken pipe")


def is_whole(folder, code, err, reason):
    assert code == 0, err
    assert complete_checkpoints(folder / "run/checkpoints")[-1].step == 12
    assert [row["step"] for row in figures(folder / "run/metrics.csv")] == [str(step) for step in range(1, 13)]
    told = f"stdout does not take what is printed ({reason}): the run goes on, and its folder has all figures\n"
    assert err.count(told) == (reason is not None)
    assert err.count("stdout does not") == (reason is not None)
    assert "Traceback" not in err


def test_a_locale_without_letters_takes_any_text() -> None:
    """Python's own choice for ASCII is to write what came as bytes, and to fail at all else."""
    code = "from mtp_lightning.console.errors import guard_output; guard_output(print); print('tr\\xe4ume')"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=locale, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, rb"tr\xe4ume" + b"\n")
